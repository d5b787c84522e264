"""Sampling of rows with parameters of their own: against part 1's sampler with the same keys, NumPy and log-softmax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from readme_jax import generation
from readme_jax.serving import sampling
from readme_jax.serving.request import Request, SamplingParams

VOCAB, WIDTH = 300, 64
SETTINGS = [
    dict(temperature=0.0),
    dict(temperature=1.0, seed=3),
    dict(temperature=0.7, top_k=5),
    dict(temperature=1.3, top_p=0.8, seed=2**32 - 1),
    dict(temperature=2.0, top_k=40, top_p=0.5),
    dict(temperature=0.01, top_p=1e-6),
    dict(temperature=1e4, top_k=1),
    dict(temperature=1.0, top_k=VOCAB + 5, top_p=0.999),
    dict(temperature=0.0, top_k=3, top_p=0.1),
]


def request(prompt=(1, 2), output=(), choice=0, **options):
    made = Request(list(prompt), SamplingParams(**options), choice=choice)
    made.tokens += list(output)
    return made


@jax.jit
def draw(logits_BV, rows, history):
    return sampling.sample(logits_BV.T, rows, history)


def run(logits_BV, requests):
    history = sampling.host_history(requests, WIDTH, VOCAB)
    if history is None:
        shape = (len(requests), WIDTH)
        history = sampling.History(np.full(shape, VOCAB, np.int32), np.zeros(shape, np.int32))
    return jax.tree.map(np.asarray, draw(logits_BV, sampling.host_rows(requests), history))


def some_logits(rows, seed=0, ties=False):
    logits_BV = np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3
    return np.round(logits_BV * 2) / 2 if ties else logits_BV


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("places", [1, 40])
def test_a_mixed_batch_draws_what_generation_draws(mesh, ties, places):
    """The same keys through `generation.sample`, one row at a time, give the same tokens, whatever the place."""
    requests, expected, rng = [], [], np.random.default_rng(places)
    logits_BV = some_logits(places * len(SETTINGS), seed=places, ties=ties)
    for i, row_V in enumerate(logits_BV):
        options, choice, index = SETTINGS[i % len(SETTINGS)], int(rng.integers(0, 4)), int(rng.integers(0, 9))
        requests.append(request(output=[7] * index, choice=choice, **options))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(options.get("seed", 0)), choice), index)
        one = generation.sample(jnp.asarray(row_V[None]), key[None], generation.Sampling(**options))
        expected.append(int(one[0]))
    order = rng.permutation(len(requests))
    got = run(logits_BV[order], [requests[i] for i in order]).token_B
    assert got.dtype == np.int32 and got.tolist() == np.array(expected)[order].tolist()
    assert len(set(expected)) > 4


def test_min_p_keeps_what_is_near_the_best(mesh):
    logits_V = some_logits(1, seed=4)[0]
    requests = [request(temperature=1.5, min_p=0.2, seed=seed) for seed in range(400)]
    got = run(np.repeat(logits_V[None], len(requests), 0), requests).token_B
    p_V = np.exp((logits_V - logits_V.max()).astype(np.float64) / 1.5)
    kept = np.flatnonzero(p_V >= 0.2)
    assert 2 < len(kept) < 60 and set(got.tolist()) <= set(kept.tolist())
    share, want = np.bincount(got, minlength=VOCAB)[kept] / len(got), p_V[kept] / p_V[kept].sum()
    assert (np.abs(share - want) <= 5 * np.sqrt(want * (1 - want) / len(got))).all()
    alone = run(logits_V[None], [request(temperature=1.5, min_p=1.0, seed=9)]).token_B
    assert alone.tolist() == [int(logits_V.argmax())]


def penalised(logits_V, prompt, output, repetition=1.0, presence=0.0, frequency=0.0):
    """In plain NumPy, as transformers (repetition) and OpenAI (the others) define it."""
    x_V = logits_V.astype(np.float64).copy()
    for token in set(prompt) | set(output):
        x_V[token] = x_V[token] / repetition if x_V[token] > 0 else x_V[token] * repetition
    for token in set(output):
        x_V[token] -= presence + frequency * output.count(token)
    return x_V


def test_penalties_change_the_choice_and_not_the_log_probabilities(mesh):
    rng, requests, expected = np.random.default_rng(5), [], []
    logits_BV = some_logits(24, seed=6)
    for row_V in logits_BV:
        best = np.argsort(-row_V)[:6].tolist()
        prompt, output = best[3:6] + [0], best[:1] * int(rng.integers(1, 4)) + best[2:3]
        how = [dict(repetition=1.7), dict(presence=1.5), dict(frequency=0.6), dict(repetition=0.5), {}][
            len(requests) % 5
        ]
        expected.append(penalised(row_V, prompt, output, **how).argmax())
        requests.append(
            request(prompt, output, logprobs=0, **{f"{name}_penalty": value for name, value in how.items()})
        )
    drawn = run(logits_BV, requests)
    assert drawn.token_B.tolist() == expected
    assert (drawn.token_B != logits_BV.argmax(-1)).sum() > 8
    wide_BV = logits_BV.astype(np.float64)
    logprob_BV = wide_BV - np.log(np.exp(wide_BV).sum(-1, keepdims=True))
    np.testing.assert_allclose(drawn.logprob_B, logprob_BV[np.arange(24), expected], atol=1e-5)


def test_penalties_hold_for_drawn_tokens_too(mesh):
    logits_V = np.zeros(VOCAB, np.float32)
    requests = [
        request([3], [5, 6], temperature=1.0, presence_penalty=2, frequency_penalty=2, seed=s) for s in range(900)
    ]
    got = np.bincount(run(np.repeat(logits_V[None], 900, 0), requests).token_B, minlength=VOCAB)
    want = 900 / (VOCAB - 2 + 2 * np.exp(-4.0))
    assert got[[5, 6]].sum() <= 2 and abs(np.delete(got, [5, 6]).mean() - want) < 0.05


def test_log_probabilities_only_where_asked(mesh):
    logits_BV = some_logits(3, seed=8)
    requests = [request(logprobs=20), request(), request(temperature=1.0, logprobs=4, seed=1)]
    drawn = run(logits_BV, requests)
    assert not drawn.logprob_B[1] and not drawn.top_logprob_BK[1].any() and not drawn.top_BK[1].any()
    for row in (0, 2):
        wide_V = logits_BV[row].astype(np.float64)
        logprob_V = wide_V - np.log(np.exp(wide_V).sum())
        order = np.argsort(-logprob_V)[:20]
        assert drawn.top_BK[row].tolist() == order.tolist()
        np.testing.assert_allclose(drawn.top_logprob_BK[row], logprob_V[order], atol=1e-5)
        np.testing.assert_allclose(drawn.logprob_B[row], logprob_V[drawn.token_B[row]], atol=1e-5)
    pair_2B = np.stack([drawn.token_B, [4, 4, 4]])
    one = sampling.score(pair_2B[:, 2], drawn, 2, 4)
    assert one.expert == 4 and len(one.best) == 4 and one.best[0][0] == int(logits_BV[2].argmax())
    silent = sampling.score(pair_2B[:, 1], drawn, 1, -1)
    assert np.isnan(silent.logprob) and silent.best == () and silent.token == int(logits_BV[1].argmax())


def test_empty_rows_and_a_small_vocabulary(mesh):
    rows = sampling.host_rows([None, request(logprobs=20)])
    history = sampling.History(np.full((2, 4), 7, np.int32), np.zeros((2, 4), np.int32))
    logits_BV = np.array([[0, 2, 2, 1, 0, 0, 0], [5, 1, 1, 1, 6, 0, 0]], np.float32)
    rows, history = jax.tree.map(jnp.asarray, (rows, history))
    drawn = sampling.sample(jnp.asarray(logits_BV.T), rows, history)
    assert drawn.token_B.tolist() == [1, 4], "the first of equals"
    assert drawn.top_BK.shape == (2, sampling.TOP) and drawn.top_BK[1, :2].tolist() == [4, 0]


def test_history_counts_the_output_alone():
    history = sampling.host_history([request(), request([3, 3, 9], [3, 4, 4], repetition_penalty=1.2)], 8, VOCAB)
    assert (history.token_BH[0] == VOCAB).all()
    assert history.token_BH[1].tolist() == [3, 4, 9] + [VOCAB] * 5
    assert history.count_BH[1].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert sampling.host_history([None, request(temperature=1.0)], 8, VOCAB) is None
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert sampling.penalised(dataclasses.replace(SamplingParams(), **{name: 0.5}))


@pytest.mark.parametrize("vocab", [5, 128, 300])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_is_argmax(mesh, vocab, rows):
    """The first of equals, in logits [V, B] of any size."""
    logits_VB = np.random.default_rng(vocab).integers(-3, 3, (vocab, rows)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(sampling.greedy)(jnp.asarray(logits_VB)), logits_VB.argmax(0))
