"""The next token of every row of a batch, on the device: each row with parameters of its own, one program for all.

Letters: B rows, V vocabulary, H distinct tokens of a row's history. A row draws with the key that
`generation.generate` uses for it, so equal seeds give equal text whatever else is in the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.serving.request import Request, SamplingParams

TOP = 20  # best tokens whose log-probabilities come back
LANES = 128
MASKED = -jnp.inf
GREEDY = SamplingParams()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Parameters of each row. real_BP: float32 temperature, top_p, min_p, repetition, presence and frequency penalty.

    whole_BP: int32 top_k, choice, index of the token within the output, whether log-probabilities are wanted.
    seed_B: uint32.
    """

    real_BP: jax.Array
    whole_BP: jax.Array
    seed_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What penalties look at. token_BH: int32 distinct ids of prompt and output, V or more for none. count_BH: int32
    occurrences in the output."""

    token_BH: jax.Array
    count_BH: jax.Array


class Drawn(NamedTuple):
    """token_B int32; float32 log-probability of it and of the TOP best, [B, TOP], under the model's own distribution:
    zeros in rows that did not ask."""

    token_B: jax.Array
    logprob_B: jax.Array
    top_BK: jax.Array
    top_logprob_BK: jax.Array


def host_rows(requests: Sequence[Request | None]) -> Rows:
    """NumPy arrays of `Rows`; None is a row without a request."""
    each = [(r.sampling, r.choice, r.generated) if r else (GREEDY, 0, 0) for r in requests]
    real = [
        (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        for s, _, _ in each
    ]
    whole = [(min(s.top_k, 2**31 - 1), choice, index, s.logprobs is not None) for s, choice, index in each]
    seed = np.array([s.seed for s, _, _ in each], np.uint32)
    return Rows(np.array(real, np.float32), np.array(whole, np.int32), seed)  # pyright: ignore[reportArgumentType]


def penalised(sampling: SamplingParams) -> bool:
    """Whether the row's history matters."""
    return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0)


def host_history(requests: Sequence[Request | None], width: int, vocab: int) -> History | None:
    """NumPy arrays of `History`, `width` tokens wide; None when no row is penalised."""
    if not any(r is not None and penalised(r.sampling) for r in requests):
        return None
    token_BH = np.full((len(requests), width), vocab, np.int32)
    count_BH = np.zeros((len(requests), width), np.int32)
    for row, request in enumerate(requests):
        if request is None or not penalised(request.sampling):
            continue
        token = np.unique(np.array(request.tokens, np.int32))
        output, occurs = np.unique(np.array(request.tokens[len(request.prompt) :], np.int32), return_counts=True)
        token_BH[row, : len(token)] = token
        count_BH[row, np.searchsorted(token, output)] = occurs
    return History(token_BH, count_BH)  # pyright: ignore[reportArgumentType]


def _lanes(x_BV: jax.Array, fill: float | int) -> jax.Array:
    """[B, V / LANES, LANES]: a reduction over the middle axis is vectorised everywhere, over V it is not on CPU."""
    return jnp.pad(x_BV, ((0, 0), (0, -x_BV.shape[1] % LANES)), constant_values=fill).reshape(len(x_BV), -1, LANES)


def _most(x_BV: jax.Array) -> jax.Array:
    return jnp.max(jnp.max(_lanes(x_BV, MASKED), 1), -1)


def _total(x_BV: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sum(_lanes(x_BV, 0), 1), -1)


def best(x_BV: jax.Array) -> jax.Array:
    """argmax, int32 [B]: the first of equals."""
    x_BUL = _lanes(x_BV, MASKED)
    id_UL = jnp.arange(x_BUL[0].size, dtype=jnp.int32).reshape(x_BUL.shape[1:])
    most_B = jnp.max(jnp.max(x_BUL, 1), -1)
    at_BUL = jnp.where(x_BUL == most_B[:, None, None], id_UL, jnp.int32(2**31 - 1))
    return jnp.minimum(jnp.min(jnp.min(at_BUL, 1), -1), x_BV.shape[1] - 1)


def greedy(x_VB: jax.Array) -> jax.Array:
    """`best` of logits [V, B]."""
    v, b = x_VB.shape
    x_UX = jnp.pad(x_VB, ((0, -v % LANES), (0, 0)), constant_values=MASKED).reshape(-1, LANES * b)
    most_B = jnp.max(jnp.max(x_UX, 0).reshape(LANES, b), 0)
    id_UX = (jnp.arange(x_UX.size, dtype=jnp.int32) // b).reshape(x_UX.shape)
    at_UX = jnp.where(x_UX == jnp.tile(most_B, LANES), id_UX, jnp.int32(2**31 - 1))
    return jnp.minimum(jnp.min(jnp.min(at_UX, 0).reshape(LANES, b), 0), v - 1)


def _penalise(logits_BV: jax.Array, rows: Rows, history: History) -> jax.Array:
    repetition_B1, presence_B1, frequency_B1 = (rows.real_BP[:, i, None] for i in (3, 4, 5))
    row_B1 = jnp.arange(len(logits_BV))[:, None]
    old_BH = logits_BV.at[row_B1, history.token_BH].get(mode="fill", fill_value=0)
    new_BH = jnp.where(old_BH > 0, old_BH / repetition_B1, old_BH * repetition_B1)
    new_BH -= presence_B1 * (history.count_BH > 0) + frequency_B1 * history.count_BH
    return logits_BV.at[row_B1, history.token_BH].set(new_BH, mode="drop")


def _ordered(x: jax.Array) -> jax.Array:
    """int32 that compare as the float32 do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _least(order_BV: jax.Array, above) -> jax.Array:
    """int32 [B]: the smallest key k with above(k) true, where above is false below some key and true from it on.

    32 halvings over the bits of a float instead of a sort of the vocabulary: exact, and ties fall together.
    """

    def halve(_, bounds):
        low_B, high_B = bounds  # above(low) is false or unknown, above(high) is true
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        good_B = above(middle_B)
        return jnp.where(good_B, low_B, middle_B + 1), jnp.where(good_B, middle_B, high_B)

    b = order_BV.shape[0]
    start = jnp.full(b, -(2**31), jnp.int32), jnp.full(b, 2**31 - 1, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, start)[1]


def _filter(logits_BV: jax.Array, rows: Rows) -> jax.Array:
    """top_k, then top_p, then min_p, as `generation.sample` and transformers: ties at a border are kept."""
    top_k_B, top_p_B, min_p_B = rows.whole_BP[:, 0], rows.real_BP[:, 1], rows.real_BP[:, 2]
    order_BV = _ordered(logits_BV)
    vocab = logits_BV.shape[1]
    k_B = jnp.where((top_k_B == 0) | (top_k_B >= vocab), vocab, top_k_B).astype(jnp.float32)

    def enough(key_B: jax.Array) -> jax.Array:
        """Fewer than k tokens are better than the key."""
        return _total((order_BV > key_B[:, None]).astype(jnp.float32)) < k_B

    kept_BV = order_BV >= _least(order_BV, enough)[:, None]
    logits_BV = jnp.where(kept_BV, logits_BV, MASKED)
    p_BV = jnp.exp(logits_BV - _most(logits_BV)[:, None])
    total_B = _total(p_BV)

    def heavy(key_B: jax.Array) -> jax.Array:
        """The tokens better than the key have less than top_p together: what is at the key is kept."""
        return _total(jnp.where(order_BV > key_B[:, None], p_BV, 0)) < top_p_B * total_B

    kept_BV = (order_BV >= _least(order_BV, heavy)[:, None]) | (top_p_B >= 1)[:, None]
    kept_BV &= p_BV >= min_p_B[:, None]  # p is 1 at the best token
    return jnp.where(kept_BV, logits_BV, MASKED)


def _draw(logits_BV: jax.Array, rows: Rows) -> jax.Array:
    temperature_B = rows.real_BP[:, 0]
    warm_B = temperature_B > 0
    scaled_BV = logits_BV / jnp.where(warm_B, temperature_B, 1)[:, None]
    filters = (rows.whole_BP[:, 0] > 0) | (rows.real_BP[:, 1] < 1) | (rows.real_BP[:, 2] > 0)
    scaled_BV = jax.lax.cond(jnp.any(filters & warm_B), lambda x: _filter(x, rows), lambda x: x, scaled_BV)

    def noise(seed, choice, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), index)
        return jax.random.gumbel(key, (logits_BV.shape[1],), logits_BV.dtype)

    # what `jax.random.categorical` does
    drawn_B = best(scaled_BV + jax.vmap(noise)(rows.seed_B, rows.whole_BP[:, 1], rows.whole_BP[:, 2]))
    return jnp.where(warm_B, drawn_B, best(logits_BV))


def _report(logits_BV: jax.Array, token_B: jax.Array, rows: Rows) -> Drawn:
    most_B = _most(logits_BV)
    total_B = jnp.log(_total(jnp.exp(logits_BV - most_B[:, None]))) + most_B
    size = min(TOP, logits_BV.shape[1])
    value_BK, top_BK = jax.lax.top_k(logits_BV, size)
    value_BK, top_BK = (jnp.pad(a, ((0, 0), (0, TOP - size))) for a in (value_BK, top_BK))
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0]
    wanted_B = rows.whole_BP[:, 3] > 0
    out = token_B, chosen_B - total_B, top_BK.astype(jnp.int32), value_BK - total_B[:, None]
    return Drawn(out[0], *(jnp.where(wanted_B.reshape(-1, *(1,) * (a.ndim - 1)), a, 0) for a in out[1:]))


def sample(logits_VB: jax.Array, rows: Rows, history: History) -> Drawn:
    """Draw the next token of each row from float32 logits. What no row asks for is not computed, nor turned round."""
    b = logits_VB.shape[1]
    penalties = jnp.any((rows.real_BP[:, 3] != 1) | (rows.real_BP[:, 4] != 0) | (rows.real_BP[:, 5] != 0))
    warm = jnp.any(rows.real_BP[:, 0] > 0)

    def choose(logits_VB):
        changed_BV = jax.lax.cond(penalties, lambda x: _penalise(x, rows, history), lambda x: x, logits_VB.T)
        return jax.lax.cond(warm, lambda x: _draw(x, rows), best, changed_BV)

    def report(logits_VB, token_B):
        return _report(logits_VB.T, token_B, rows)

    def nothing(_, token_B):
        return Drawn(token_B, jnp.zeros(b), jnp.zeros((b, TOP), jnp.int32), jnp.zeros((b, TOP)))

    with jax.named_scope("sample"):
        # `greedy` outside of `choose`: a branch that hands its logits on copies them
        coldest = functools.partial(jax.lax.platform_dependent, cpu=greedy, default=lambda x_VB: best(x_VB.T))
        token_B = jax.lax.cond(penalties | warm, choose, coldest, logits_VB)
        return jax.lax.cond(jnp.any(rows.whole_BP[:, 3] > 0), report, nothing, logits_VB, token_B)


class Score(NamedTuple):
    """A sampled token, the expert it will run, its log-probability (natural, before temperature, filters and penalties;
    nan when none was asked for) and those of the best tokens asked for."""

    token: int
    expert: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


def score(pair_2: np.ndarray, drawn: Drawn | None, row: int, most: int) -> Score:
    """One row of what was fetched. pair_2: token and expert. most: best tokens asked for, -1: no log-probability."""
    token, expert = pair_2.tolist()
    if drawn is None or most < 0:
        return Score(token, expert, float("nan"))
    best = zip(drawn.top_BK[row, :most].tolist(), drawn.top_logprob_BK[row, :most].tolist())
    return Score(token, expert, float(drawn.logprob_B[row]), tuple(best))
