"""The jitted computations of training: label, route, router step, expert step. Pure functions over pure dicts.

Each phase has its own parameters, optimizer state and step counter (STYLE 4.7); what is frozen is an ordinary argument
and is never differentiated or donated. Microbatches are summed by `lax.scan` and divided once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from readme_jax import losses, sharding
from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.labels import LabelConfig, combine_layers, label_tap
from readme_jax.losses import HeadLoss
from readme_jax.models import backbone, parallel, router
from readme_jax.models.backbone import Params, Remat
from readme_jax.models.experts import ExpertTable, Grouped, Masked, Parallel
from readme_jax.routing import exchange, group, group_rows
from readme_jax.sharding import batch_devices, expert_devices

Tuned = Literal["all", "ffn"]
Way = Literal["masked", "grouped", "parallel"]
FFN = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phase:
    """What one phase of training changes. step: int32 steps taken in this phase; params, opt_state: pure trees."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def start(params: Params, tx: optax.GradientTransformation) -> Phase:
    """A phase at step 0 that owns `params` (they will be donated)."""
    # tx.init under jit: one program, and the state is placed like the parameters
    return Phase(sharding.put(np.int32(0)), params, jax.jit(tx.init)(params))


def split_tuned(params: Params, tuned: Tuned) -> tuple[Params, Params]:
    """(tuned, frozen) parts of the backbone: `all` of it, or the FFN only (paper)."""
    if tuned == "all":
        return params, {}
    layers = params["layers"]
    part = {k: v for k, v in layers.items() if k in FFN}
    rest = {k: v for k, v in params.items() if k != "layers"}
    return {"layers": part}, rest | {"layers": {k: v for k, v in layers.items() if k not in FFN}}


def join(tuned: Params, frozen: Params) -> Params:
    """Inverse of `split_tuned`."""
    layers = frozen.get("layers", {}) | tuned.get("layers", {})
    return {**frozen, **tuned, "layers": layers}


def accumulate(loss_fn, params: Params, batch: Any) -> tuple[Params, dict[str, jax.Array]]:
    """float32 gradient of the weighted mean of loss_fn over microbatches [A, ...]; loss_fn gives (sum, (weight, sums)).

    It lies like the parameters at rest.
    """

    def one(micro):
        (total, (weight, extra)), grad = jax.value_and_grad(loss_fn, has_aux=True)(params, micro)
        return grad, {"loss": total, **extra}, weight

    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        grad, sums, weight = one(jax.tree.map(lambda a: a[0], batch))
    else:
        abstract = jax.eval_shape(one, jax.tree.map(lambda a: a[0], batch))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (abstract[1], abstract[2]))
        zero_grad = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)

        def body(carry, micro):
            return jax.tree.map(jnp.add, carry, one(micro)), None  # bfloat16 gradients are summed in float32

        (grad, sums, weight), _ = jax.lax.scan(body, (zero_grad, *zeros), batch)
    weight = jnp.maximum(weight, 1.0)
    means = {name: value / weight for name, value in sums.items()}
    return jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grad), means


def update(phase: Phase, tx: optax.GradientTransformation, grad: Params) -> tuple[Phase, jax.Array]:
    """The phase after one optimizer step, and the gradient's global norm."""
    updates, opt_state = tx.update(grad, phase.opt_state, phase.params)
    return Phase(phase.step + 1, optax.apply_updates(phase.params, updates), opt_state), optax.global_norm(grad)


def make_label(cfg: ModelConfig, labels: LabelConfig, dtype=jnp.float32):
    """jitted (params, table, ids_BT, segments_BT) -> target distribution float32 [B, T, E] from a dense run."""

    @jax.jit
    def label(params: Params, table: ExpertTable, ids_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        tap = label_tap(labels)
        _, seen = backbone.forward(cfg, params, ids_BT, segments_BT, table=table, tap=tap, dtype=dtype)
        return combine_layers(seen, labels)

    return label


def make_top_k(cfg: ModelConfig, k: int, chunk: int, dtype=jnp.float32):
    """jitted (dense teacher's params, ids_BT, segments_BT) -> losses.TopK of its k likeliest tokens at each position;
    logits of `chunk` positions at a time."""

    @jax.jit
    def top_k(params: Params, ids_BT: jax.Array, segments_BT: jax.Array) -> losses.TopK:
        x_BTD, _ = backbone.forward(cfg, params, ids_BT, segments_BT, dtype=dtype)
        return losses.top_k(backbone.head_weight(params), x_BTD, k, chunk)

    return top_k


def make_route(router_cfg: RouterConfig, theta: float):
    """jitted (router params, ids_ABT, segments_ABT) -> int32 experts [A, B, T]."""

    @jax.jit
    def route(params: Params, ids_ABT: jax.Array, segments_ABT: jax.Array) -> jax.Array:
        return jax.lax.map(
            lambda micro: router.route(router_cfg, params, micro[0], micro[1], theta), (ids_ABT, segments_ABT)
        )

    return route


def make_router_step(router_cfg: RouterConfig, theta: float, tx: optax.GradientTransformation, balance: float = 0.0):
    """jitted (phase, batch) -> (phase, metrics). batch: ids, segments [A,B,T], target [A,B,T,E]. One compile.

    Among the metrics, means over tokens: agreement with the label's best expert, entropy (nats) of the router's
    distribution, and load [E], the share of tokens that each expert is chosen for. balance: weight of
    `losses.balance_loss` in each microbatch; it is then a metric too, and part of the loss.
    """

    def loss_fn(params, micro):
        weight_BT = (micro["segments"] > 0).astype(jnp.float32)
        logits_BTE = router.logits(router_cfg, params, micro["ids"], micro["segments"], theta)
        total, weight = losses.router_loss(logits_BTE, micro["target"], weight_BT)
        chosen_BT = jnp.argmax(logits_BTE, -1)
        hit_BT = chosen_BT == jnp.argmax(micro["target"], -1)
        entropy_BT = -jnp.sum(jax.nn.softmax(logits_BTE) * jax.nn.log_softmax(logits_BTE), -1)
        load_E = jnp.sum(jax.nn.one_hot(chosen_BT, logits_BTE.shape[-1]) * weight_BT[..., None], (0, 1))
        sums = {"agreement": hit_BT * weight_BT, "entropy": entropy_BT * weight_BT}
        extra = {name: jnp.sum(each) for name, each in sums.items()} | {"load": load_E}
        if balance:
            extra["balance"] = weight * losses.balance_loss(logits_BTE, weight_BT)
            total += balance * extra["balance"]
        return total, (weight, extra)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(phase: Phase, batch: dict[str, jax.Array]):
        grad, means = accumulate(loss_fn, phase.params, batch)
        phase, norm = update(phase, tx, grad)
        return phase, means | {"grad_norm": norm}

    return step


def make_expert_step(
    cfg: ModelConfig,
    head: HeadLoss,
    tx: optax.GradientTransformation,
    *,
    dtype=jnp.float32,
    remat: Remat = "none",
):
    """jitted (phase, frozen, teacher, table, batch) -> (phase, metrics).

    frozen: the untuned part of the backbone; teacher: the whole dense teacher (its FFN runs all channels) in any dtype.
    batch: ids, segments [A,B,T] and route (leaves [A, ...]). The teacher is None when kd is 0, or when the batch says
    what it would: `teacher`, a losses.TopK of leaves [A,B,T,...]. One compile per route shape.
    """

    def loss_fn(params, frozen, teacher, table, micro):
        whole = join(params, frozen)
        target_BT, weight_BT = losses.next_token(micro["ids"], micro["segments"])
        x_BTD, _ = backbone.forward(
            cfg, whole, micro["ids"], micro["segments"], table=table, route=micro["route"], dtype=dtype, remat=remat
        )
        said = micro.get("teacher")
        if head.kd and said is None:
            teacher_BTD, _ = backbone.forward(cfg, teacher, micro["ids"], micro["segments"], dtype=dtype)
            said = losses.Dense(*jax.lax.stop_gradient((teacher_BTD, backbone.head_weight(teacher))))
        total, parts = losses.head_loss(head, backbone.head_weight(whole), x_BTD, said, target_BT, weight_BT)
        return total, (jnp.sum(weight_BT), parts)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(phase: Phase, frozen: Params, teacher: Params | None, table: ExpertTable, batch: dict[str, Any]):
        grad, means = accumulate(lambda p, m: loss_fn(p, frozen, teacher, table, m), phase.params, batch)
        phase, norm = update(phase, tx, grad)
        return phase, means | {"grad_norm": norm}

    return step


def make_load(experts: int):
    """jitted (expert_ABT, segments_ABT) -> float32 [E], the share of tokens (padding left out) of each expert."""

    @jax.jit
    def load(expert_ABT: jax.Array, segments_ABT: jax.Array) -> jax.Array:
        real_ABT = (segments_ABT > 0).astype(jnp.float32)
        count_E = jnp.sum(jax.nn.one_hot(expert_ABT, experts) * real_ABT[..., None], (0, 1, 2))
        return count_E / jnp.maximum(jnp.sum(count_E), 1)

    return load


def plan(
    expert_ABT: np.ndarray | jax.Array,
    experts: int,
    way: Way,
    put: Callable[..., Any] | None = None,
    compiled: Sequence[int] = (),
) -> Masked | Grouped | Parallel:
    """Route of a batch from expert ids [A, B, T]: stacked over microbatches, ready for the expert step.

    `grouped` and `parallel` need ids of the host; `parallel` plans for the current mesh, and its put(array, spec)
    takes a PartitionSpec too. compiled: of `parallel`, sizes to prefer (`routing.exchange`).
    """
    if way == "masked":
        return Masked((put or jnp.asarray)(expert_ABT))
    expert_ABT = np.asarray(expert_ABT)
    if way == "parallel":
        peers = expert_devices()
        plans = exchange(expert_ABT, experts, data=batch_devices() // peers, peers=peers, compiled=compiled)
        return parallel.place(plans, put or sharding.put)
    put = put or jnp.asarray
    flat_AM = expert_ABT.reshape(expert_ABT.shape[0], -1)
    rows = group_rows(flat_AM.shape[1], experts)
    plans = [group(expert_M, experts, rows) for expert_M in flat_AM]
    width = max(source.shape[0] for source, _, _ in plans)
    empty = flat_AM.shape[1]
    source = np.stack([np.pad(s, ((0, width - len(s)), (0, 0)), constant_values=empty) for s, _, _ in plans])
    owner = np.stack([np.pad(e, (0, width - len(e))) for _, e, _ in plans])
    return Grouped(put(source), put(owner), put(np.stack([r for _, _, r in plans])))
