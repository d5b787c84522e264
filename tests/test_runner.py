"""The runner against one-at-a-time generation: every family, any pages, any mix of rows, waves; what it compiles."""

import jax
import numpy as np
import pytest
from run_rows import FAMILIES, Loop, write

from readme_jax import api
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import Work

NEW = 10
SMALL = Limits(batch_requests=2, batch_tokens=32, chunk=16)
PROMPTS = [[5, 9, 130], [7] * 19 + [11, 120, 3], list(range(20, 75)), [1]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder, written when first asked for."""
    root, made = tmp_path_factory.mktemp("served"), {}

    def get(name, **options):
        key = name + str(sorted(options.items()))
        if key not in made:
            made[key] = write(root / f"{len(made)}", FAMILIES[name], **options)
        return made[key]

    return get


def alone(folder, prompts, new=NEW, **options):
    """What part 1 generates, one prompt at a time."""
    model = api.Model(folder)
    return [model.generate([p], max_new_tokens=new, stop_tokens=[], **options)[0].tolist() for p in prompts]


@pytest.mark.parametrize("resident", [False, True], ids=["pool", "in place"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_experts_are_those_of_generate(folders, name, resident):
    folder = folders(name)
    loop = Loop(folder, seed=1, limits=SMALL, resident=resident)
    requests = [loop.request(p, max_new_tokens=NEW, logprobs=20) for p in PROMPTS]
    scores = loop.run(requests, most=3)
    model = api.Model(folder)
    for request, expected, got in zip(requests, alone(folder, PROMPTS), scores):
        assert request.tokens[len(request.prompt) :] == expected
        whole = [request.tokens]
        assert request.experts == model.route(whole)[0].tolist()
        logits_TV = model.logits(whole)[0][len(request.prompt) - 1 : -1].astype(np.float64)
        logprob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        np.testing.assert_allclose([s.logprob for s in got], logprob_TV.max(-1), atol=1e-4)
        for row_V, score in zip(logprob_TV, got):
            np.testing.assert_allclose([p for _, p in score.best], np.sort(row_V)[::-1][:20], atol=1e-4)
            np.testing.assert_allclose([p for _, p in score.best], row_V[[i for i, _ in score.best]], atol=1e-4)
    loop.runner.close()


@pytest.mark.parametrize(
    "options, share, policy",
    [
        (dict(), 0.0, "lookahead"),
        (dict(storage="separate", experts=4), 0.0, "lru"),
        (dict(experts=1, routed=False), 0.6, "random"),
    ],
    ids=["tied", "separate", "no router"],
)  # fmt: skip
def test_a_pool_too_small_for_a_batch_changes_nothing(folders, options, share, policy):
    """Loads, evictions and layers run in parts; a table without a router runs expert 0."""
    folder = folders("llama biases" if options else "llama", **options)
    loop = Loop(folder, share=share, seed=2, policy=policy, page=2, limits=SMALL)
    requests = [loop.request(p, max_new_tokens=NEW) for p in PROMPTS]
    loop.run(requests)
    for request, expected in zip(requests, alone(folder, PROMPTS)):
        assert request.tokens[len(request.prompt) :] == expected
    counters = loop.residency.counters
    assert counters.evictions > 20 and (counters.waves > 20 or options.get("experts") == 1)


@pytest.fixture(scope="module")
def loop(folders):
    """One runner for what follows, all pages resident after a while."""
    loop = Loop(folders("llama"), seed=3)
    yield loop
    loop.runner.close()


def test_equal_seeds_give_equal_text_whatever_the_batch(loop, folders):
    options = dict(temperature=1.2, top_k=40, top_p=0.9)
    model = api.Model(folders("llama"))
    rows = [model.generate([p] * 2, max_new_tokens=NEW, stop_tokens=[], seed=5, **options) for p in PROMPTS]
    requests = [
        loop.request(p, max_new_tokens=NEW, seed=5, choice=choice, **options) for choice in (0, 1) for p in PROMPTS
    ]
    plain = loop.request(PROMPTS[1], max_new_tokens=NEW)
    loop.run([*requests, plain])
    expected = [rows[i][choice].tolist() for choice in (0, 1) for i in range(len(PROMPTS))]
    assert [r.tokens[len(r.prompt) :] for r in requests] == expected
    assert plain.tokens[len(plain.prompt) :] == alone(folders("llama"), PROMPTS[1:2])[0]
    assert expected[0] != expected[4]


def test_random_steps_compile_nothing_and_sync_only_in_fetch(loop):
    """Any mix of rows, lengths, sampling and loads after `compile`: no program is made, nothing moves unasked."""
    runner = loop.runner
    assert runner.programs == len(runner.shapes) * 2 + len(runner._grid.lengths) + 2 <= 24
    before, rng = runner.compiles, np.random.default_rng(4)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            requests = [
                loop.request(
                    rng.integers(0, 150, rng.integers(1, 90)).tolist(),
                    max_new_tokens=int(rng.integers(1, 12)),
                    temperature=float(rng.choice([0, 0.8])),
                    top_p=float(rng.choice([1, 0.7])),
                    logprobs=[None, 0, 3][rng.integers(0, 3)],
                    presence_penalty=float(rng.choice([0, 1.0])),
                )
                for _ in range(6)
            ]
            loop.run(requests)
    assert runner.compiles == before and runner.programs <= 24
    jax.jit(lambda x: x * 3)(np.float32(1))
    assert runner.compiles > before, "the counter counts"


def test_penalties_follow_the_history(loop, folders):
    """Greedy with penalties, against the model's logits changed in NumPy."""
    request = loop.request(PROMPTS[2], max_new_tokens=8, repetition_penalty=1.3, frequency_penalty=0.4)
    loop.run([request])
    logits_TV, new = api.Model(folders("llama")).logits([request.tokens])[0].astype(np.float64), []
    for place in range(len(request.prompt) - 1, len(request.tokens) - 1):
        x_V = logits_TV[place]
        for token in set(request.prompt) | set(new):
            x_V[token] = (x_V[token] / 1.3 if x_V[token] > 0 else x_V[token] * 1.3) - 0.4 * new.count(token)
        new.append(int(x_V.argmax()))
    assert request.tokens[len(request.prompt) :] == new


def test_bytes_read_are_those_of_the_pages_and_the_rest(loop):
    runner, bank = loop.runner, loop.bank
    request = loop.request([1, 2, 3], max_new_tokens=4)
    for count in (2, 1, 1):
        before = runner.bytes_read
        loop.step([Work(request, request.computed, count)])
        used = set(request.experts[request.computed - count : request.computed])
        kv = 2 * 3 * 2 * 8 * 4 * request.computed
        head = runner._head_bytes if request.computed >= 3 else 0
        rest = 3 * runner._layer_bytes
        assert runner.bytes_read - before == bank.need_count(used) * bank.page_bytes + kv + head + rest
    assert runner._layer_bytes == 4 * (32 * 64 + 32 * 32 + 2 * 32)


def test_bfloat16_agrees_with_float32_nearly(folders):
    loop = Loop(folders("qwen2"), dtype="bfloat16", limits=Limits(batch_requests=1, batch_tokens=16, chunk=16))
    request = loop.request(PROMPTS[2], max_new_tokens=1, logprobs=3)
    (score,), model = loop.run([request])[0], api.Model(folders("qwen2"))
    logits_V = model.logits([request.prompt])[0, -1].astype(np.float64)
    logprob_V = logits_V - np.log(np.exp(logits_V).sum())
    assert request.experts[:-1] == model.route([request.prompt])[0].tolist(), "the router stays in float32"
    np.testing.assert_allclose(score.logprob, logprob_V[score.token], atol=0.2)
    assert loop.runner.router_s(2, times=3) > 0
    loop.runner.close()
