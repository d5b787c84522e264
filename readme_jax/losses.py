"""Losses: next token and distillation through a fused head, and the router's labels (METHOD section 3).

All router label kinds reduce to one target distribution per token: the reference's loss is linear in it, and the
mean over layers of the losses is the loss of the mean target (up to the reference's sum in place of the mean).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from readme_jax.config import require
from readme_jax.models.layers import ACTIVATION
from readme_jax.sharding import (
    BATCH,
    REPLICATED,
    batch_devices,
    computed,
    gather,
    model_devices,
    spec,
    stored,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Router labels from a dense run."""

    kind: Literal["overlap", "energy"] = "energy"
    """`overlap`: channels among the token's most active that an expert owns (reference). `energy`: share of the FFN
    output's energy that an expert keeps."""
    signed: bool = False
    """Rank h instead of |h| in `overlap` (the reference's oversight, for parity); needs kind=overlap."""
    hard_weight: float = 0.0
    """Weight of the arg-max label (reference: 0.75)."""
    soft_weight: float = 1.0
    """Weight of the softmax label (reference: 0.25)."""
    label_smoothing: float = 0.0
    """Smoothing of the arg-max label (reference: 0.5)."""
    temperature: float = 0.02
    """Divides the score before the softmax (reference: 0.1)."""

    def __post_init__(self):
        require(self.kind == "overlap" or not self.signed, "signed=true has no meaning for kind=energy")
        require(self.temperature > 0, f"temperature={self.temperature} must be positive")
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        require(
            min(self.hard_weight, self.soft_weight) >= 0 and self.hard_weight + self.soft_weight > 0,
            f"hard_weight={self.hard_weight} and soft_weight={self.soft_weight} must be >= 0 and not both 0",
        )


PAPER_LABELS = LabelConfig(
    kind="overlap", signed=True, hard_weight=0.75, soft_weight=0.25, label_smoothing=0.5, temperature=0.1
)


def kth_largest(x: jax.Array, rank: int) -> jax.Array:
    """The value at zero-based descending `rank` along the last axis, keepdims; exact, float32.

    Bisection on the order-preserving integer image of the floats: 32 passes of compare and count instead of a sort,
    which XLA runs 10x slower on CPU.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    key = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def narrow(i, found):
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.sum(key >= trial, -1, keepdims=True, dtype=jnp.int32) > rank
        return jnp.where(enough, trial, found)

    zero = jnp.sum(key, -1, keepdims=True) & jnp.uint32(0)  # placed like the counts, whatever the mesh
    found = jax.lax.fori_loop(0, 32, narrow, zero)
    bits = jnp.where(found >> 31 == 1, found ^ jnp.uint32(1 << 31), ~found)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def overlap_score(h_BTF: jax.Array, exclusive_EF: jax.Array, signed: bool) -> jax.Array:
    """The reference's `overlap` score of a layer, float32 [B, T, E], before its factor 10.

    exclusive_EF: bool masks without the channels common to all experts. With n channels in expert 0's mask and s the
    activations in descending order: f = sum over m in {n-1, 4n/5, 3n/5, 2n/5, n/5} of [h > s_m] / 3n, score = f M^T.
    Subtracting the batch mean, as the reference does, changes neither softmax nor argmax.
    """
    ranked = h_BTF.astype(jnp.float32) if signed else jnp.abs(h_BTF.astype(jnp.float32))
    n = jnp.sum(exclusive_EF[0], dtype=jnp.int32)
    # n differs by layer inside the scan, so the rank is traced.
    ranks = [n - 1] + [(k * n) // 5 for k in (4, 3, 2, 1)]
    marks_BTF = sum((ranked > kth_largest(ranked, jnp.maximum(m, 0))).astype(jnp.float32) for m in ranks)
    score_BTE = jnp.einsum("btf,ef->bte", marks_BTF, exclusive_EF.astype(jnp.float32), out_sharding=ACTIVATION)
    return score_BTE / (3.0 * jnp.maximum(n, 1))


def energy_score(h_BTF: jax.Array, w_down_FD: jax.Array, mask_EF: jax.Array) -> jax.Array:
    """Share of sum_j h_j^2 ||w_j||^2 that each expert keeps, float32 [B, T, E]; w_j is column j of down_proj."""
    norm_F = jnp.sum(jnp.square(w_down_FD.astype(jnp.float32)), -1)
    energy_BTF = jnp.square(h_BTF.astype(jnp.float32)) * norm_F
    kept_BTE = jnp.einsum("btf,ef->bte", energy_BTF, mask_EF.astype(jnp.float32), out_sharding=ACTIVATION)
    return kept_BTE / jnp.maximum(jnp.sum(energy_BTF, -1, keepdims=True), 1e-30)


def target(score_BTE: jax.Array, config: LabelConfig) -> jax.Array:
    """Target distribution [B, T, E] of a score: hard_weight * smoothed one-hot + soft_weight * softmax(score / T)."""
    experts = score_BTE.shape[-1]
    hard_BTE = jax.nn.one_hot(jnp.argmax(score_BTE, -1), experts) * (1 - config.label_smoothing)
    hard_BTE += config.label_smoothing / experts
    return config.hard_weight * hard_BTE + config.soft_weight * jax.nn.softmax(score_BTE / config.temperature, -1)


def label_tap(config: LabelConfig):
    """What `backbone.forward(tap=...)` needs to label tokens in a dense run with the expert table given."""

    def tap(h_BTF, layer, table):
        mask_EF = jnp.pad(table.mask_LEU, ((0, 0), (0, h_BTF.shape[-1] - table.mask_LEU.shape[-1])))
        if config.kind == "energy":
            return energy_score(h_BTF, layer.w_down[...], mask_EF)
        exclusive_EF = mask_EF & ~jnp.all(mask_EF, axis=0, keepdims=True)
        return target(overlap_score(h_BTF, exclusive_EF, config.signed), config)

    return tap


def combine_layers(seen_LBTE: jax.Array, config: LabelConfig) -> jax.Array:
    """Target distribution [B, T, E] from what `label_tap` gave per layer.

    `overlap`: the mean of the layers' targets. `energy`: the target of the mean share.
    """
    mean_BTE = jnp.mean(seen_LBTE, axis=0)
    return target(mean_BTE, config) if config.kind == "energy" else mean_BTE


def router_loss(logits_BTE: jax.Array, target_BTE: jax.Array, weight_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of -sum_e target log softmax(logits) over weighted tokens, sum of weights)."""
    per_token_BT = -jnp.sum(target_BTE * jax.nn.log_softmax(logits_BTE, -1), -1)
    return jnp.sum(per_token_BT * weight_BT), jnp.sum(weight_BT)


def next_token(ids_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(target ids [B, T], float32 weights [B, T]): the next token where it belongs to the same document, else 0."""
    following_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    weight_BT = (segments_BT == following_BT) & (segments_BT > 0)
    return jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1))), weight_BT.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """Static part of `head_loss`: kd weighs KL(teacher || student), ce the next-token loss; chunk in positions."""

    kd: float
    ce: float
    chunk: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A teacher whose logits are computed beside the student's: its hidden states [B, T, D] and head [V, D]."""

    hidden_BTD: jax.Array
    head_VD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's distribution over the vocabulary, see `top_k`: of the K likeliest tokens, likeliest
    first, logp = logit - log sum exp of all logits (float32 [B, T, K]) and the ids, token (integers [B, T, K]); of the
    others together, the log of their probability, rest (float32 [B, T], -inf when K = V)."""

    logp: jax.Array
    token: jax.Array
    rest: jax.Array


Teacher = Dense | TopK


def head_loss(
    static: HeadLoss,
    head_VD: jax.Array,
    x_BTD: jax.Array,
    teacher: Teacher | None,
    target_BT: jax.Array,
    weight_BT: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of kd * KL + ce * CE over tokens, with the sums of both parts, from hidden states [B, T, D].

    The teacher p gets no gradient; it may be None when kd is 0. With TopK, of the tokens t_1..t_K, the KL is that of
    K + 1 classes, the last of which is all other tokens:
    sum_k p(t_k) log(p(t_k) / q(t_k)) + p(rest) log(p(rest) / q(rest)), p and q normalised over the whole vocabulary.
    By the log sum inequality (Cover & Thomas, Elements of Information Theory, theorem 2.7.1) it never exceeds the full
    KL, and it is equal to it for K = V.

    Logits exist for `chunk` positions at a time, and their gradient is taken in the same pass: the [B, T, V] arrays of
    a plain implementation are never built and nothing is recomputed. Heads come as they lie at rest: each is gathered
    once, its vocabulary stays split over `model`, and its gradient is summed over the batch's devices once, behind the
    last chunk.
    """
    total, kl, ce = _fused(static, head_VD, x_BTD, teacher, target_BT, weight_BT)
    return total, {"kl": jax.lax.stop_gradient(kl), "ce": jax.lax.stop_gradient(ce)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static, head_VD, x_BTD, teacher, target_BT, weight_BT):
    return _over_mesh(static, False, head_VD, x_BTD, teacher, target_BT, weight_BT)[0]


def _fused_forward(static, head_VD, x_BTD, teacher, target_BT, weight_BT):
    sums, grad_x, grad_head = _over_mesh(static, True, head_VD, x_BTD, teacher, target_BT, weight_BT)
    return sums, (grad_x, grad_head)


def _fused_backward(static, saved, cotangents):
    grad_x, grad_head = saved
    scale = cotangents[0]
    return (grad_head * scale).astype(grad_head.dtype), (grad_x * scale).astype(grad_x.dtype), None, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _gathered_head(head_VD: jax.Array, dtype) -> jax.Array:
    """A head in the layout of the computation: the vocabulary over `model` where it divides."""
    layout = computed(("logit", "embed"), head_VD.shape)
    # first each device's part of the vocabulary, then the columns from the others: XLA does not see it by itself
    head_VD = gather(head_VD, jax.P(layout[0], jax.typeof(head_VD).sharding.spec[1]), dtype)
    return gather(head_VD, layout, dtype)


def _on_devices(run, out_specs, args):
    """run(batch axes, split, *args) on every device's part of the arrays in `args`, whose second is a head.

    batch axes: what to sum over to have the sum over the batch. split: the mesh axis over which the vocabulary is
    split, None when it is whole.
    """
    places = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, args)
    if batch_devices() * model_devices() == 1:
        # a change of type, not of place: collectives of one device would be copies
        return jax.reshard(run((), None, *jax.reshard(args, REPLICATED)), out_specs)
    run = functools.partial(run, BATCH, places[1][0])
    return jax.shard_map(run, in_specs=places, out_specs=out_specs)(*args)


def _over_mesh(static, gradient, head_VD, x_BTD, teacher, target_BT, weight_BT):
    """`_scan_chunks` with the heads gathered before and the head's gradient back at rest behind."""
    rest = stored(("logit", "embed"), head_VD.shape)
    by_token, heads = None, None
    if static.kd and isinstance(teacher, Dense):
        by_token, heads = teacher.hidden_BTD, _gathered_head(teacher.head_VD, teacher.hidden_BTD.dtype)
    elif static.kd:
        by_token = teacher
    sums, grad_x, grad_head = _on_devices(
        functools.partial(_scan_chunks, static, gradient, rest[1]),
        (jax.P(), ACTIVATION, rest) if gradient else (jax.P(), None, None),
        (x_BTD, _gathered_head(head_VD, x_BTD.dtype), by_token, heads, target_BT, weight_BT),
    )
    if gradient:
        grad_head = gather(grad_head, jax.typeof(head_VD).sharding.spec, head_VD.dtype)
    return sums, grad_x, grad_head


def _chunks(a_BT: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], zero-padded."""
    b, t = a_BT.shape[:2]
    chunk = min(chunk, t)
    a_BT = jnp.pad(a_BT, ((0, 0), (0, -t % chunk)) + ((0, 0),) * (a_BT.ndim - 2))
    return jnp.moveaxis(a_BT.reshape(b, -1, chunk, *a_BT.shape[2:]), 1, 0)


def _logits(x_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", x_BTD, head_VD, preferred_element_type=jnp.float32)


def _log_softmax(logits_BTV: jax.Array, split: str | None) -> jax.Array:
    """Over a vocabulary of which this device has a part, the mesh axis `split` the whole."""
    top_BT1 = jnp.max(logits_BTV, -1, keepdims=True)
    top_BT1 = jax.lax.pmax(top_BT1, split) if split else top_BT1
    shifted_BTV = logits_BTV - top_BT1
    return shifted_BTV - jnp.log(_sum_over(jnp.sum(jnp.exp(shifted_BTV), -1, keepdims=True), split))


def _sum_over(part: jax.Array, axes: str | tuple[str, ...] | None) -> jax.Array:
    return jax.lax.psum(part, axes) if axes else part


def _own_ids(ids: jax.Array, width: int, split: str | None) -> jax.Array:
    """Vocabulary ids relative to this device's part; `width` where they are not in it."""
    if not split:
        return ids
    ids = ids - jax.lax.axis_index(split) * width
    return jnp.where((ids >= 0) & (ids < width), ids, width)


def _pick(values_BTV: jax.Array, own_BT: jax.Array, split: str | None) -> jax.Array:
    """The value of one vocabulary entry a token, [B, T]."""
    if not split:
        return jnp.take_along_axis(values_BTV, own_BT[..., None], -1)[..., 0]
    width = values_BTV.shape[-1]
    part_BT = jnp.take_along_axis(values_BTV, jnp.minimum(own_BT, width - 1)[..., None], -1)[..., 0]
    return _sum_over(jnp.where(own_BT < width, part_BT, 0), split)


def _whole_kl(logp_BTV, teacher_BTD, teacher_VD, split):
    """(KL(teacher || student) [B, T], what the student's probabilities are pulled to [B, T, V])."""
    logp_teacher = _log_softmax(_logits(teacher_BTD, teacher_VD), split)
    p_teacher = jnp.exp(logp_teacher)
    return _sum_over(jnp.sum(p_teacher * (logp_teacher - logp_BTV), -1), split), p_teacher


def _top_kl(logp_BTV, teacher: TopK, split):
    """The same over the teacher's K most likely tokens and one class for the rest; see `head_loss`.

    With q the student: d KL / d logit_j = q_j - p_j for a token of the K, else q_j - p(rest) q_j / q(rest).
    """
    logp_BTK, ids_BTK, rest_BT = teacher.logp, teacher.token.astype(jnp.int32), teacher.rest
    b, t, width = logp_BTV.shape
    own_BTK = _own_ids(ids_BTK, width, split)
    at = (jnp.arange(b)[:, None, None], jnp.arange(t)[:, None], own_BTK)
    p_BTV = jnp.full_like(logp_BTV, -1).at[at].set(jnp.exp(logp_BTK), mode="drop")
    q_BTV = jnp.exp(logp_BTV)
    q_rest_BT = _sum_over(jnp.sum(jnp.where(p_BTV < 0, q_BTV, 0), -1), split)
    q_rest_BT = jnp.maximum(q_rest_BT, 1e-37)  # none is left when K = V
    # ids of other devices are out of range here: nothing is added for them, each is in range on one device
    logq_BTK = logp_BTV.at[at].get(mode="fill", fill_value=0)
    kl_BT = jnp.sum(jnp.exp(logp_BTK) * (logp_BTK - _sum_over(logq_BTK, split)), -1)
    p_rest_BT = jnp.exp(rest_BT)
    kl_BT += jnp.where(p_rest_BT > 0, p_rest_BT * (rest_BT - jnp.log(q_rest_BT)), 0)
    return kl_BT, jnp.where(p_BTV < 0, q_BTV * (p_rest_BT / q_rest_BT)[..., None], p_BTV)


def _scan_chunks(static, gradient, scattered, batch, split, x_BTD, head, by_token, teacher_head, target_BT, weight_BT):
    """Sums, gradient of x, gradient of the head, from this device's tokens and its part of the vocabulary.

    scattered: mesh axes over which the head's gradient is left split by columns.
    """
    b, t, d = x_BTD.shape

    def body(carry, inputs):
        total, kl, ce, grad_head = carry
        x, teacher, ids, weight = inputs
        logp = _log_softmax(_logits(x, head), split)
        own = _own_ids(ids, logp.shape[-1], split)
        nll = -_pick(logp, own, split)
        kl_t, pull = jnp.zeros_like(nll), None
        if static.kd:
            if teacher_head is None:
                kl_t, pull = _top_kl(logp, teacher, split)
            else:
                kl_t, pull = _whole_kl(logp, teacher, teacher_head, split)
        loss = jnp.sum((static.kd * kl_t + static.ce * nll) * weight)
        grad_x = None
        if gradient:
            p = jnp.exp(logp)
            wanted = static.ce * (jnp.arange(p.shape[-1]) == own[..., None])
            if pull is not None:
                wanted = wanted + static.kd * pull
            grad = (((static.kd + static.ce) * p - wanted) * weight[..., None]).astype(x.dtype)
            grad_x = _sum_over(jnp.einsum("btv,vd->btd", grad, head), split)
            grad_head += jnp.einsum("btv,btd->vd", grad, x, preferred_element_type=jnp.float32)
        return (total + loss, kl + jnp.sum(kl_t * weight), ce + jnp.sum(nll * weight), grad_head), grad_x

    def zeros(shape, *over):
        # typed as differing between the devices that will add to it
        over = batch + tuple(axis for axis in over if axis)
        return jax.lax.pcast(jnp.zeros(shape, jnp.float32), over, to="varying") if over else jnp.zeros(shape)

    start = (zeros(()), zeros(()), zeros(()), zeros(head.shape, split) if gradient else zeros(()))
    inputs = jax.tree.map(lambda a: _chunks(a, static.chunk), (x_BTD, by_token, target_BT, weight_BT))
    (*sums, grad_head), grad_x = jax.lax.scan(body, start, inputs)
    sums = tuple(_sum_over(part, batch) for part in sums)
    if not gradient:
        return sums, None, None
    grad_x = jnp.moveaxis(grad_x, 0, 1).reshape(b, -1, d)[:, :t]
    columns = (scattered,) if isinstance(scattered, str) else scattered or ()
    if batch and columns:
        grad_head = jax.lax.psum_scatter(grad_head, columns, scatter_dimension=1, tiled=True)
    return sums, grad_x, _sum_over(grad_head, tuple(axis for axis in batch if axis not in columns))


def token_loss(
    head_VD: jax.Array, x_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss summed by row, float32 [B], and the weights summed by row [B]; logits in chunks of positions."""

    def run(batch, split, x_BTD, head, target_BT, weight_BT):
        def one(inputs):
            x, ids, weight = inputs
            logp = _log_softmax(_logits(x, head), split)
            return jnp.sum(-_pick(logp, _own_ids(ids, logp.shape[-1], split), split) * weight, -1)

        return jnp.sum(jax.lax.map(one, tuple(_chunks(a, chunk) for a in (x_BTD, target_BT, weight_BT))), 0)

    args = (x_BTD, _gathered_head(head_VD, x_BTD.dtype), target_BT, weight_BT)
    return _on_devices(run, spec("batch"), args), jnp.sum(weight_BT, -1)


def top_k(head_VD: jax.Array, x_BTD: jax.Array, k: int, chunk: int) -> TopK:
    """What `head_loss` needs of a teacher, from its hidden states and head; logits of `chunk` positions at a time."""
    head_VD = gather(head_VD, jax.P(None, None), x_BTD.dtype)

    def run(batch, split, x_BTD, head):
        def one(x):
            logp_BTV = _log_softmax(_logits(x, head), None)
            logp_BTK, token_BTK = jax.lax.top_k(logp_BTV, k)
            at = (jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[:, None], token_BTK)
            # the others are summed by themselves: 1 - sum p(t_k) has no digits left where they are unlikely
            rest_BT = jnp.log(jnp.sum(jnp.exp(logp_BTV).at[at].set(0), -1))
            return TopK(logp_BTK, token_BTK, rest_BT)

        b, t = x_BTD.shape[:2]
        found = jax.lax.map(one, _chunks(x_BTD, chunk))
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(b, -1, *a.shape[3:])[:, :t], found)

    return _on_devices(run, TopK(ACTIVATION, ACTIVATION, spec("batch", "seq")), (x_BTD, head_VD))
