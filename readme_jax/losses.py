"""Losses: next token and distillation through a fused head, and the router's against its labels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

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


def router_loss(logits_BTE: jax.Array, target_BTE: jax.Array, weight_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of -sum_e target log softmax(logits) over weighted tokens, sum of weights)."""
    per_token_BT = -jnp.sum(target_BTE * jax.nn.log_softmax(logits_BTE, -1), -1)
    return jnp.sum(per_token_BT * weight_BT), jnp.sum(weight_BT)


def balance_loss(logits_BTE: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """E * sum_e f_e P_e over weighted tokens: f_e the share of tokens whose arg max is e, without gradient, P_e the
    mean probability of e. 1 when both are even, E when all tokens go to one expert (Switch Transformers, arXiv
    2101.03961, equation 4; there a probability also scales the output, here it does not)."""
    experts, tokens = logits_BTE.shape[-1], jnp.maximum(jnp.sum(weight_BT), 1)
    first_BTE = jax.nn.one_hot(jnp.argmax(logits_BTE, -1), experts)
    load_E, mean_E = (
        jnp.sum(each_BTE * weight_BT[..., None], (0, 1)) / tokens
        for each_BTE in (first_BTE, jax.nn.softmax(logits_BTE, -1))
    )
    return experts * jnp.sum(load_E * mean_E)


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
    """[B, T, ...] -> [T / chunk, M, ...] with M = B * chunk, zero-padded.

    Tokens in one axis, because XLA's CPU backend takes 18 times as long for a sum over V of [1, T, V].
    """
    b, t = a_BT.shape[:2]
    chunk = min(chunk, t)
    a_BT = jnp.pad(a_BT, ((0, 0), (0, -t % chunk)) + ((0, 0),) * (a_BT.ndim - 2))
    parts = jnp.moveaxis(a_BT.reshape(b, -1, chunk, *a_BT.shape[2:]), 1, 0)
    return parts.reshape(len(parts), -1, *a_BT.shape[2:])


def _whole(a_NM: jax.Array, b: int, t: int) -> jax.Array:
    """The inverse of `_chunks`: [T / chunk, M, ...] -> [B, T, ...]."""
    a_NBT = a_NM.reshape(len(a_NM), b, -1, *a_NM.shape[2:])
    return jnp.moveaxis(a_NBT, 0, 1).reshape(b, -1, *a_NM.shape[2:])[:, :t]


def _logits(x_MD: jax.Array, head_VD: jax.Array) -> jax.Array:
    return jnp.einsum("md,vd->mv", x_MD, head_VD, preferred_element_type=jnp.float32)


def _log_softmax(logits_MV: jax.Array, split: str | None) -> jax.Array:
    """Over a vocabulary of which this device has a part, the mesh axis `split` the whole."""
    top_M1 = _largest(logits_MV)
    top_M1 = jax.lax.pmax(top_M1, split) if split else top_M1
    shifted_MV = logits_MV - top_M1
    return shifted_MV - jnp.log(_sum_over(jnp.sum(jnp.exp(shifted_MV), -1, keepdims=True), split))


def _largest(logits_MV: jax.Array) -> jax.Array:
    """The maximum over the last axis, float32 [M, 1], found by the order-preserving integer images of the floats.

    A maximum of floats XLA's CPU backend would fuse into the matmul before it, which then takes four times as long.
    """

    def image(bits):  # its own inverse
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    bits_MV = jax.lax.bitcast_convert_type(logits_MV, jnp.int32)
    return jax.lax.bitcast_convert_type(image(jnp.max(image(bits_MV), -1, keepdims=True)), jnp.float32)


def _sum_over(part: jax.Array, axes: str | tuple[str, ...] | None) -> jax.Array:
    return jax.lax.psum(part, axes) if axes else part


def _own_ids(ids: jax.Array, width: int, split: str | None) -> jax.Array:
    """Vocabulary ids relative to this device's part; `width` where they are not in it."""
    if not split:
        return ids
    ids = ids - jax.lax.axis_index(split) * width
    return jnp.where((ids >= 0) & (ids < width), ids, width)


def _pick(values_MV: jax.Array, own_M: jax.Array, split: str | None) -> jax.Array:
    """The value of one vocabulary entry a token, [M]."""
    if not split:
        return jnp.take_along_axis(values_MV, own_M[:, None], -1)[:, 0]
    width = values_MV.shape[-1]
    part_M = jnp.take_along_axis(values_MV, jnp.minimum(own_M, width - 1)[:, None], -1)[:, 0]
    return _sum_over(jnp.where(own_M < width, part_M, 0), split)


def _whole_kl(logp_MV, teacher_MD, teacher_VD, split):
    """(KL(teacher || student) [M], what the student's probabilities are pulled to [M, V])."""
    logp_teacher = _log_softmax(_logits(teacher_MD, teacher_VD), split)
    p_teacher = jnp.exp(logp_teacher)
    return _sum_over(jnp.sum(p_teacher * (logp_teacher - logp_MV), -1), split), p_teacher


def _top_kl(logp_MV, teacher: TopK, split):
    """The same over the teacher's K most likely tokens and one class for the rest; see `head_loss`.

    With q the student: d KL / d logit_j = q_j - p_j for a token of the K, else q_j - p(rest) q_j / q(rest).
    """
    logp_MK, ids_MK, rest_M = teacher.logp, teacher.token.astype(jnp.int32), teacher.rest
    at = (jnp.arange(len(logp_MV))[:, None], _own_ids(ids_MK, logp_MV.shape[1], split))
    p_MV = jnp.full_like(logp_MV, -1).at[at].set(jnp.exp(logp_MK), mode="drop")
    q_MV = jnp.exp(logp_MV)
    q_rest_M = _sum_over(jnp.sum(jnp.where(p_MV < 0, q_MV, 0), -1), split)
    q_rest_M = jnp.maximum(q_rest_M, 1e-37)  # none is left when K = V
    # ids of other devices are out of range here: nothing is added for them, each is in range on one device
    logq_MK = logp_MV.at[at].get(mode="fill", fill_value=0)
    kl_M = jnp.sum(jnp.exp(logp_MK) * (logp_MK - _sum_over(logq_MK, split)), -1)
    p_rest_M = jnp.exp(rest_M)
    kl_M += jnp.where(p_rest_M > 0, p_rest_M * (rest_M - jnp.log(q_rest_M)), 0)
    return kl_M, jnp.where(p_MV < 0, q_MV * (p_rest_M / q_rest_M)[:, None], p_MV)


def _scan_chunks(static, gradient, scattered, batch, split, x_BTD, head, by_token, teacher_head, target_BT, weight_BT):
    """Sums, gradient of x, gradient of the head, from this device's tokens and its part of the vocabulary.

    scattered: mesh axes over which the head's gradient is left split by columns.
    """
    b, t, _ = x_BTD.shape

    def body(carry, inputs):
        total, kl, ce, grad_head = carry
        x_MD, teacher, ids_M, weight_M = inputs
        logp_MV = _log_softmax(_logits(x_MD, head), split)
        own_M = _own_ids(ids_M, logp_MV.shape[-1], split)
        nll_M = -_pick(logp_MV, own_M, split)
        kl_M, pull_MV = jnp.zeros_like(nll_M), None
        if static.kd:
            if teacher_head is None:
                kl_M, pull_MV = _top_kl(logp_MV, teacher, split)
            else:
                kl_M, pull_MV = _whole_kl(logp_MV, teacher, teacher_head, split)
        loss = jnp.sum((static.kd * kl_M + static.ce * nll_M) * weight_M)
        grad_x = None
        if gradient:
            p_MV = jnp.exp(logp_MV)
            wanted_MV = static.ce * (jnp.arange(p_MV.shape[-1]) == own_M[:, None])
            if pull_MV is not None:
                wanted_MV = wanted_MV + static.kd * pull_MV
            grad_MV = (((static.kd + static.ce) * p_MV - wanted_MV) * weight_M[:, None]).astype(x_MD.dtype)
            grad_x = _sum_over(jnp.einsum("mv,vd->md", grad_MV, head), split)
            grad_head += jnp.einsum("mv,md->vd", grad_MV, x_MD, preferred_element_type=jnp.float32)
        return (total + loss, kl + jnp.sum(kl_M * weight_M), ce + jnp.sum(nll_M * weight_M), grad_head), grad_x

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
    columns = (scattered,) if isinstance(scattered, str) else scattered or ()
    if batch and columns:
        grad_head = jax.lax.psum_scatter(grad_head, columns, scatter_dimension=1, tiled=True)
    return sums, _whole(grad_x, b, t), _sum_over(grad_head, tuple(axis for axis in batch if axis not in columns))


def token_loss(
    head_VD: jax.Array, x_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss summed by row, float32 [B], and the weights summed by row [B]; logits in chunks of positions."""

    def run(batch, split, x_BTD, head, target_BT, weight_BT):
        def one(inputs):
            x_MD, ids_M, weight_M = inputs
            logp_MV = _log_softmax(_logits(x_MD, head), split)
            return -_pick(logp_MV, _own_ids(ids_M, logp_MV.shape[-1], split), split) * weight_M

        loss_NM = jax.lax.map(one, tuple(_chunks(a, chunk) for a in (x_BTD, target_BT, weight_BT)))
        return jnp.sum(_whole(loss_NM, *target_BT.shape), -1)

    args = (x_BTD, _gathered_head(head_VD, x_BTD.dtype), target_BT, weight_BT)
    return _on_devices(run, spec("batch"), args), jnp.sum(weight_BT, -1)


def top_k(head_VD: jax.Array, x_BTD: jax.Array, k: int, chunk: int) -> TopK:
    """What `head_loss` needs of a teacher, from its hidden states and head; logits of `chunk` positions at a time."""
    head_VD = gather(head_VD, jax.P(None, None), x_BTD.dtype)

    def run(batch, split, x_BTD, head):
        def one(x_MD):
            logp_MV = _log_softmax(_logits(x_MD, head), None)
            logp_MK, token_MK = jax.lax.top_k(logp_MV, k)
            # the others are summed by themselves: 1 - sum p(t_k) has no digits left where they are unlikely
            rest_MV = jnp.exp(logp_MV).at[jnp.arange(len(x_MD))[:, None], token_MK].set(0)
            return TopK(logp_MK, token_MK, jnp.log(jnp.sum(rest_MV, -1)))

        found = jax.lax.map(one, _chunks(x_BTD, chunk))
        return jax.tree.map(lambda a: _whole(a, *x_BTD.shape[:2]), found)

    return _on_devices(run, TopK(ACTIVATION, ACTIVATION, spec("batch", "seq")), (x_BTD, head_VD))
