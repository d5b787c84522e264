"""Separate experts spread over the mesh's `expert` axis: tokens go to their experts and come back (DESIGN section 4).

A device holds E / X whole experts, their channels split over `model`. The host's plan (`routing.exchange`) says which
tokens a device sends to each of its X peers; two all-to-alls a layer move them, nothing is sorted on the device, no
token is dropped and no expert weight ever moves.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from readme_jax import routing
from readme_jax.config import require
from readme_jax.sharding import AXES, batch_devices, expert_devices, model_devices, spec

# Names of what remat must keep, so that the backward pass does not send the tokens again.
ROWS = "expert_rows"
REMAT_NAMES = (ROWS,)

BANK = ("w_gate", "w_up", "w_down", "b_gate", "b_up")  # what has one row a channel; b_down does not


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parallel:
    """Route for the `parallel` way, made on the host by `routing.exchange`; all int32, sharded over G or B.

    G = data * X batch devices, M tokens on each, S rows for each pair of peers. A leading axis of A microbatches is
    taken off by the step.

    send_GXS: token (0..M-1) in each row a device sends to each peer, M in an empty row.
    place_BT: row (0..X*S-1) in which a token leaves its device, and in which its result comes back; X*S for a token
    that goes nowhere.
    The last three are None where a device holds one expert. group_GPR: received row in each row of each block of R
    rows, X*S in an empty row; the rows of a block belong to one expert, the blocks lie in the order of the experts.
    ungroup_GXS: the inverse, P*R for an empty row. blocks_GE: blocks of each of the device's experts.
    """

    send_GXS: jax.Array
    place_BT: jax.Array
    group_GPR: jax.Array | None
    ungroup_GXS: jax.Array | None
    blocks_GE: jax.Array | None


SPECS = {
    "send_GXS": spec("batch", None, None),
    "place_BT": spec("batch", "seq"),
    "group_GPR": spec("batch", None, None),
    "ungroup_GXS": spec("batch", None, None),
    "blocks_GE": spec("batch", None),
}
WEIGHT, BIAS, TOKENS = spec("own_expert", "mlp", None), spec("own_expert", "mlp"), spec("batch", "seq", None)


def place(plan: routing.Exchange, put: Callable) -> Parallel:
    """The route of a plan on the mesh: put(array, PartitionSpec) places an array."""
    return _with_specs(lambda array, partition: put(array, jax.P(None, *partition)), plan)


def abstract_routes(shape_ABT: tuple[int, int, int], experts: int) -> list[Parallel]:
    """Every route that a batch of this shape can have on the current mesh, as shapes: what a program compiles ahead, or
    lowers for a mesh that is not there (an abstract one).

    One entry a rung of `routing.ladder`; leaves are `jax.ShapeDtypeStruct` with their sharding.
    """
    mesh, peers = jax.sharding.get_mesh(), expert_devices()
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh  # devices, where there are some
    data = batch_devices() // peers

    def shaped(shape, partition):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(None, *partition)))

    tokens = shape_ABT[1] * shape_ABT[2] // (data * peers)
    rungs = routing.ladder(tokens, peers)
    plans = (routing.exchange_shapes(shape_ABT, experts, data=data, peers=peers, rows=rows) for rows in rungs)
    return [_with_specs(shaped, plan) for plan in plans]


def _with_specs(make: Callable, values: Iterable[Any]) -> Parallel:
    """make(value, PartitionSpec) of each field of a route that is there."""
    pairs = zip(SPECS.items(), values, strict=True)
    fields: dict[str, Any] = {name: None if value is None else make(value, s) for (name, s), value in pairs}
    return Parallel(**fields)


# ---- layout of the weights ----------------------------------------------------------------------


def separate_layout(params: dict, experts: int) -> dict:
    """A backbone's tree with its experts apart: the FFN's [L, E * C, ...] as [L, E, C, ...], a view of host arrays.

    Leaves may be abstract. ConfigError when the experts do not divide F, the mesh's `expert` axis the experts, or its
    `model` axis their channels.
    """
    rows = params["layers"]["w_gate"].shape[1]
    require(rows % experts == 0, f"mlp={rows} must be a multiple of experts={experts}: these experts are not separate")
    routing.check_split(experts, expert_devices())
    width, many = rows // experts, model_devices()
    require(width % many == 0, f"channels={width} of an expert must be a multiple of the mesh's model={many}")
    return _bank(params, lambda shape: (shape[0], experts, width, *shape[2:]))


def flat_layout(params: dict) -> dict:
    """Inverse of `separate_layout`, for host arrays: what model folders hold."""
    return _bank(params, lambda shape: (shape[0], shape[1] * shape[2], *shape[3:]))


def _bank(params: dict, shape: Callable) -> dict:
    def reshape(a):
        new = shape(a.shape)
        return jax.ShapeDtypeStruct(new, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a.reshape(new)

    layers = params["layers"]
    return params | {"layers": layers | {name: reshape(layers[name]) for name in BANK if name in layers}}


def separate_specs(specs: dict) -> dict:
    """The tree of a backbone's PartitionSpecs, with those of separate experts in the FFN: never split over `data`."""
    layers = specs["layers"]
    own = {name: WEIGHT if name.startswith("w") else BIAS for name in BANK if name in layers}
    return specs | {"layers": layers | {name: jax.P(None, *partition) for name, partition in own.items()}}


# ---- rows in and out ----------------------------------------------------------------------------


@jax.custom_vjp
def _take(x_ND: jax.Array, row_Q: jax.Array, back_N: jax.Array) -> jax.Array:
    """x_ND[row_Q], zero where row_Q is N. back_N is the inverse: the backward pass gathers too, it never scatters."""
    return x_ND.at[row_Q].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _take_forward(x_ND, row_Q, back_N):
    return _take(x_ND, row_Q, back_N), (row_Q, back_N)


def _take_backward(saved, grad_QD):
    row_Q, back_N = saved
    return _take(grad_QD, back_N, row_Q), None, None


_take.defvjp(_take_forward, _take_backward)


def _exchange(x_QD: jax.Array) -> jax.Array:
    """Send block x of the X blocks of S rows to peer x; block i of what comes back is from peer i."""
    return jax.lax.all_to_all(x_QD, "expert", split_axis=0, concat_axis=0, tiled=True)


# ---- one matmul an expert -----------------------------------------------------------------------
# Rows lie in blocks of R, each of one expert, W rows in all. Three products: `up` from D to C and `down` from C to D
# by an expert's w_CD, and `outer`, the sum over an expert's rows of outer products: the gradient of both into w.

_CONTRACT = {"up": ((1,), (1,)), "down": ((1,), (0,)), "outer": ((0,), (0,))}  # dimensions of (rows, w_CD or rows)


def _owners(blocks_E: jax.Array, count: int) -> jax.Array:
    """int32 [count]: expert of each block; blocks past the last one, whose rows are zero, name the last expert."""
    past_PE = jnp.arange(count, dtype=jnp.int32)[:, None] >= jnp.cumsum(blocks_E)
    return jnp.minimum(jnp.sum(past_PE, -1, dtype=jnp.int32), blocks_E.shape[0] - 1)


def _by_blocks(kind: str, r: int, used_only: bool, a_WN: jax.Array, b: jax.Array, blocks_E: jax.Array) -> jax.Array:
    """The portable product: a loop over blocks, one expert's weights at a time."""
    count = a_WN.shape[0] // r
    owner_P = _owners(blocks_E, count)

    def dot(x, y):
        return jax.lax.dot_general(x, y, (_CONTRACT[kind], ((), ())), preferred_element_type=jnp.float32)

    def block(x_WN, p):
        return jax.lax.dynamic_slice_in_dim(x_WN, p * r, r)

    def add_outer(p, sum_ECD):
        return sum_ECD.at[owner_P[p]].add(dot(block(a_WN, p), block(b, p)))

    def set_rows(p, y_WN):
        y_RN = dot(block(a_WN, p), b[owner_P[p]])
        return jax.lax.dynamic_update_slice_in_dim(y_WN, y_RN.astype(y_WN.dtype), p * r, 0)

    if kind == "outer":
        body, start = add_outer, jnp.zeros((blocks_E.shape[0], a_WN.shape[1], b.shape[1]), jnp.float32)
    else:
        body, start = set_rows, jnp.zeros((a_WN.shape[0], b.shape[1 if kind == "up" else 2]), a_WN.dtype)
    last = jnp.sum(blocks_E) if used_only else count
    return jax.lax.fori_loop(0, last, body, jax.lax.pcast(start, AXES, to="varying")).astype(a_WN.dtype)


def _ragged(kind: str, r: int, a_WN: jax.Array, b: jax.Array, blocks_E: jax.Array) -> jax.Array:
    """The product as a ragged dot, whose rows past the last block are undefined: masked going in and coming out."""
    real_W = jnp.arange(a_WN.shape[0], dtype=jnp.int32) < r * jnp.sum(blocks_E)
    rows, other = _CONTRACT[kind]
    outer = kind == "outer"
    numbers = jax.lax.RaggedDotDimensionNumbers(
        # w_ECD has the experts first
        dot_dimension_numbers=((rows, other if outer else (other[0] + 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if outer else [0],
    )

    def real(x_WN):
        return jnp.where(real_W[:, None], x_WN, 0)

    y = jax.lax.ragged_dot_general(
        real(a_WN), real(b) if outer else b, r * blocks_E, numbers, preferred_element_type=a_WN.dtype
    )
    return y if outer else real(y)


def _product(kind: str, r: int, a_WN: jax.Array, b: jax.Array, blocks_E: jax.Array) -> jax.Array:
    """The product, by the platform it is lowered for. A CPU skips the empty blocks at the end; a GPU would have to ask
    the device for their number before every turn of the loop."""
    return jax.lax.platform_dependent(
        a_WN,
        b,
        blocks_E,
        tpu=functools.partial(_ragged, kind, r),
        cpu=functools.partial(_by_blocks, kind, r, True),
        default=functools.partial(_by_blocks, kind, r, False),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(kind: str, r: int, x_WN: jax.Array, w_ECD: jax.Array, blocks_E: jax.Array) -> jax.Array:
    """Rows in blocks of r times their expert's w_CD: `up` [W, D] -> [W, C], `down` [W, C] -> [W, D].

    Inside `shard_map`, all arguments varying over all mesh axes. blocks_E: int32 blocks of each expert, in order.
    """
    return _product(kind, r, x_WN, w_ECD, blocks_E)


def _matmul_forward(kind, r, x_WN, w_ECD, blocks_E):
    return _product(kind, r, x_WN, w_ECD, blocks_E), (x_WN, w_ECD, blocks_E)


def _matmul_backward(kind, r, saved, grad_WN):
    x_WN, w_ECD, blocks_E = saved
    back, pair = ("down", (grad_WN, x_WN)) if kind == "up" else ("up", (x_WN, grad_WN))
    return _product(back, r, grad_WN, w_ECD, blocks_E), _product("outer", r, *pair, blocks_E), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


# ---- the FFN ------------------------------------------------------------------------------------


def _local(weights: dict[str, jax.Array], x_BTD: jax.Array, route: Parallel) -> jax.Array:
    """The FFN of one device: its tokens go to their experts, its experts run what arrives, the results come back."""
    # Every value is typed by the axes it differs over; what enters the same on several devices is cast, and the
    # transpose of the cast is the sum over them: weights over `data`, tokens over `model`.
    weights = jax.lax.pcast(weights, "data", to="varying")
    x_BTD, route = jax.lax.pcast((x_BTD, route), "model", to="varying")
    b, t, d = x_BTD.shape
    send_Q, place_M = route.send_GXS.reshape(-1), route.place_BT.reshape(-1)
    rows_WD = _exchange(_take(x_BTD.reshape(b * t, d), send_Q, place_M))
    if route.group_GPR is None or route.ungroup_GXS is None or route.blocks_GE is None:
        rows_WD = checkpoint_name(rows_WD, ROWS)
        y_WD = _one_expert(rows_WD, {name: w[0] for name, w in weights.items()})
    else:
        group_W, ungroup_Q = route.group_GPR.reshape(-1), route.ungroup_GXS.reshape(-1)
        rows_WD = checkpoint_name(_take(rows_WD, group_W, ungroup_Q), ROWS)
        y_WD = _several_experts(rows_WD, weights, route.blocks_GE[0], route.group_GPR.shape[-1])
        y_WD = _take(y_WD, ungroup_Q, group_W)
    y_MD = _take(_exchange(y_WD), place_M, send_Q)
    return jax.lax.psum(y_MD, "model").reshape(b, t, d)


def _one_expert(x_WD: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    gate_WC, up_WC = x_WD @ w["w_gate"].T, x_WD @ w["w_up"].T
    if "b_gate" in w:
        gate_WC, up_WC = gate_WC + w["b_gate"], up_WC + w["b_up"]
    return (jax.nn.silu(gate_WC) * up_WC) @ w["w_down"]


def _several_experts(x_WD: jax.Array, w: dict[str, jax.Array], blocks_E: jax.Array, r: int) -> jax.Array:
    def project(name) -> jax.Array:
        y_WC: jax.Array = _matmul("up", r, x_WD, w[f"w_{name}"], blocks_E)
        if f"b_{name}" not in w:
            return y_WC
        bias_PC = w[f"b_{name}"][_owners(blocks_E, len(x_WD) // r)]
        return y_WC + jnp.repeat(bias_PC, r, axis=0)

    return _matmul("down", r, jax.nn.silu(project("gate")) * project("up"), w["w_down"], blocks_E)


def ffn(x_BTD: jax.Array, layer, route: Parallel) -> jax.Array:
    """The FFN of one layer with separate experts: layer.w_gate, w_up, w_down [E, C, D], x and result [B, T, D].

    Dispatched rows are named by REMAT_NAMES. ConfigError when the route was made for another number of experts.
    """
    weights = {name: getattr(layer, name)[...].astype(x_BTD.dtype) for name in BANK if hasattr(layer, name)}
    own = 1 if route.blocks_GE is None else route.blocks_GE.shape[-1]
    experts = weights["w_gate"].shape[0]
    made = own * expert_devices()
    require(made == experts, f"the route is made for {made} experts on this mesh, the layer has {experts}")
    specs = {name: WEIGHT if w.ndim == 3 else BIAS for name, w in weights.items()}
    present = _with_specs(lambda _, partition: partition, (getattr(route, name) for name in SPECS))
    y_BTD = jax.shard_map(_local, in_specs=(specs, TOKENS, present), out_specs=TOKENS)(weights, x_BTD, route)
    return y_BTD + layer.b_down[...].astype(y_BTD.dtype) if hasattr(layer, "b_down") else y_BTD
