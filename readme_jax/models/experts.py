"""The FFN with carved experts: dense, `masked`, `grouped`, `parallel`: one signature, equal results (DESIGN 3, 4).

The channel bank of a layer is `w_gate_FD, w_up_FD, w_down_FD` (row j is channel j); the expert table lists the channel
ids of each expert. Every token runs the channels of ONE expert, the same expert in every layer. On a mesh, separate
experts may lie apart, [E, C, D] in place of [F, D]: they run the `parallel` way only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import ConfigError, require
from readme_jax.models import parallel
from readme_jax.models.layers import flat
from readme_jax.models.parallel import Parallel
from readme_jax.routing import membership
from readme_jax.sharding import REPLICATED, batch_devices, model_devices, put, spec

HIDDEN = spec("batch", "seq", "mlp")
OUTPUT = spec("batch", "seq", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertTable:
    """The expert table on the device. table_LEC: int32 channel ids. mask_LEU: bool membership, derived from it.

    U <= F is the highest channel any expert uses plus one: carving puts unused channels last, so no way of running
    experts ever reads them.
    """

    table_LEC: jax.Array
    mask_LEU: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """Route for the `masked` way. expert_BT: int32 expert of each token; `backbone.forward` takes [L, B, T] too, each
    layer's own (what pre-gating gives up: an analysis)."""

    expert_BT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped:
    """Route for the `grouped` way, made on the host by `routing.group`.

    source_PR: int32 flat token index of each row of each group (M for an empty row).
    expert_P: int32 expert of each group of rows. row_M: int32 place of each token in the flat P*R rows.
    """

    source_PR: jax.Array
    expert_P: jax.Array
    row_M: jax.Array


Route = Masked | Grouped | Parallel


def make_table(table_LEC: np.ndarray, mlp: int) -> ExpertTable:
    """Place an expert table on the current mesh; `mlp` is F. With channels sharded over `model`, U is F."""
    require(0 <= int(table_LEC.min()) and int(table_LEC.max()) < mlp, f"expert table names channels outside 0..{mlp}")
    width = mlp if model_devices() > 1 else int(table_LEC.max()) + 1
    mask_LEU = membership(table_LEC, width)
    return ExpertTable(put(table_LEC.astype(np.int32)), put(mask_LEU, spec("layer", "expert", "mlp")))


def activate(x_BTD: jax.Array, layer, keep_BTF: jax.Array | None = None, rows: slice = slice(None)) -> jax.Array:
    """h = silu(x Wg) * (x Wu), the input of down_proj: [B, T, D] -> [B, T, F] (or the first U channels), 0 where
    `keep_BTF` is False. A float mask multiplies h, and gets a gradient (`masks.py`)."""
    (b, t, _), x_MD = x_BTD.shape, flat(x_BTD)

    def wide(name: str) -> jax.Array:
        w_FD = getattr(layer, f"w_{name}")[...][rows].astype(x_MD.dtype)
        y_MF = jnp.einsum("md,fd->mf", x_MD, w_FD, out_sharding=jax.P(HIDDEN[0], HIDDEN[2]))
        if hasattr(layer, f"b_{name}"):
            y_MF += getattr(layer, f"b_{name}")[...][rows].astype(x_MD.dtype)
        return jnp.reshape(y_MF, (b, t, w_FD.shape[0]), out_sharding=HIDDEN)

    return _gated(wide("gate"), wide("up"), keep_BTF)


# Nothing but gate and up is kept for the backward pass: what comes after costs less to compute than to store.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate_BTF: jax.Array, up_BTF: jax.Array, keep_BTF: jax.Array | None) -> jax.Array:
    h_BTF = jax.nn.silu(gate_BTF) * up_BTF
    if keep_BTF is None:
        return h_BTF
    learned = keep_BTF.dtype != jnp.bool_
    return h_BTF * keep_BTF.astype(h_BTF.dtype) if learned else jnp.where(keep_BTF, h_BTF, 0)


def down(h_BTF: jax.Array, layer, rows: slice = slice(None)) -> jax.Array:
    """down_proj of hidden activations [B, T, F] (or of the channels `rows`), with its bias: [B, T, D]."""
    (b, t, _), w_FD = h_BTF.shape, layer.w_down[...][rows].astype(h_BTF.dtype)
    y_MD = jnp.einsum("mf,fd->md", flat(h_BTF), w_FD, out_sharding=jax.P(OUTPUT[0], None))
    y_BTD = jnp.reshape(y_MD, (b, t, w_FD.shape[1]), out_sharding=OUTPUT)
    return y_BTD + layer.b_down[...].astype(h_BTF.dtype) if hasattr(layer, "b_down") else y_BTD


def dense(x_BTD: jax.Array, layer, table: ExpertTable | None = None, tap=None):
    """The FFN with all channels. Returns (y_BTD, tap(h_BTF, layer, table) or None)."""
    h_BTF = activate(x_BTD, layer)
    seen = None if tap is None else tap(h_BTF, layer, table)
    return down(h_BTF, layer), seen


def masked(x_BTD: jax.Array, layer, mask_EU: jax.Array, expert_BT: jax.Array) -> jax.Array:
    """All channels that any expert has, h multiplied by the token's membership (the reference's training form)."""
    used = mask_EU.shape[-1]
    rows = slice(None) if used == layer.w_gate[...].shape[0] else slice(0, used)
    keep_BTU = mask_EU.at[expert_BT].get(out_sharding=HIDDEN)
    return down(activate(x_BTD, layer, keep_BTU, rows), layer, rows)


@jax.custom_vjp
def _rows(w_FD: jax.Array, table_EC: jax.Array, mask_EU: jax.Array) -> jax.Array:
    """w_FD[table_EC] -> [E, C, D], with a backward pass that gathers: a scatter of rows is slow on every backend."""
    return w_FD[table_EC]


def _rows_forward(w_FD, table_EC, mask_EU):
    return w_FD[table_EC], (table_EC, mask_EU, w_FD.shape[0])


def _rows_backward(saved, grad_ECD):
    table_EC, mask_EU, width = saved
    # Sorted tables: channel u is entry (number of the expert's channels below u) of its expert.
    place_EU = jnp.cumsum(mask_EU, axis=-1) - 1
    grad_UD = jnp.zeros((mask_EU.shape[1], grad_ECD.shape[2]), grad_ECD.dtype)
    for e in range(mask_EU.shape[0]):
        grad_UD += jnp.where(mask_EU[e][:, None], grad_ECD[e][jnp.maximum(place_EU[e], 0)], 0)
    return jnp.pad(grad_UD, ((0, width - grad_UD.shape[0]), (0, 0))), None, None


_rows.defvjp(_rows_forward, _rows_backward)


def grouped(x_BTD: jax.Array, layer, table_EC: jax.Array, mask_EU: jax.Array, route: Grouped) -> jax.Array:
    """Tokens ordered by expert into groups of R rows; each group runs its expert's C channels as one matmul.

    Expert rows are gathered once per layer; the plan is the same for all layers. Empty rows are zero in and dropped.
    """
    b, t, d = x_BTD.shape
    # `run` has made sure that all axes have length 1: a change of type, not of place
    mask_EU, x_BTD = jax.reshard((mask_EU, x_BTD), REPLICATED)
    x_MD = jnp.concatenate([x_BTD.reshape(b * t, d), jnp.zeros((1, d), x_BTD.dtype)])
    x_PRD = x_MD[route.source_PR]

    def here(w):
        return jax.reshard(w[...], REPLICATED).astype(x_BTD.dtype)

    def expert_rows(w):
        return _rows(here(w), table_EC, mask_EU)[route.expert_P]

    gate_PRC = jnp.einsum("prd,pcd->prc", x_PRD, expert_rows(layer.w_gate))
    up_PRC = jnp.einsum("prd,pcd->prc", x_PRD, expert_rows(layer.w_up))
    if hasattr(layer, "b_gate"):
        ids_PC = table_EC[route.expert_P]
        gate_PRC += here(layer.b_gate)[ids_PC][:, None]
        up_PRC += here(layer.b_up)[ids_PC][:, None]
    y_PRD = jnp.einsum("prc,pcd->prd", jax.nn.silu(gate_PRC) * up_PRC, expert_rows(layer.w_down))
    y_BTD = jax.reshard(y_PRD.reshape(-1, d)[route.row_M].reshape(b, t, d), OUTPUT)
    return y_BTD + layer.b_down[...].astype(y_BTD.dtype) if hasattr(layer, "b_down") else y_BTD


def run(x_BTD: jax.Array, layer, table: ExpertTable | None, route: Route | None) -> jax.Array:
    """The FFN of one layer: dense without a route, else the way the route is made for. `table` is this layer's."""
    with jax.named_scope("experts"):
        if route is None:
            return dense(x_BTD, layer)[0]
        if table is None:
            raise ConfigError("a route needs an expert table; this model is dense")
        apart = layer.w_gate[...].ndim == 3
        require(
            apart == isinstance(route, Parallel),
            "ffn=parallel runs separate experts placed [E, C, D], and they run no other way: "
            f"this bank is {layer.w_gate[...].shape}, the route {type(route).__name__}",
        )
        if isinstance(route, Parallel):
            return parallel.ffn(x_BTD, layer, route)
        if isinstance(route, Masked):
            return masked(x_BTD, layer, table.mask_LEU, route.expert_BT)
        require(batch_devices() * model_devices() == 1, "ffn=grouped runs on one device; use ffn=masked on this mesh")
        return grouped(x_BTD, layer, table.table_LEC, table.mask_LEU, route)
