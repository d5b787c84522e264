"""The engine on a real tiny model: equal to one-at-a-time generation whatever the policies, budgets, chunks and mix."""

import dataclasses
import gc
import resource
from pathlib import Path

import jax
import numpy as np
import pytest
import served

from readme_jax import api
from readme_jax.serving import parts
from readme_jax.serving.engine import Engine
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import SamplingParams
from readme_jax.serving.runner import Runner

COUNT = 200
OPTIONS = dict(
    kv_memory="96KiB", router_memory="512KiB", kv_page=4, expert_page=4, batch_requests=8, batch_tokens=32, chunk=16,
    max_live=24, context=96,
)  # fmt: skip
PAIRS = [(schedule, residency) for schedule in SCHEDULES for residency in RESIDENCIES]
BUDGETS = ("0.3x", "0.45x", "0.7x", "1.0x")


@dataclasses.dataclass
class Asked:
    """A request and what part 1 makes of it, alone."""

    prompt: list
    room: int
    tokens: list


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(folder):
    return api.load(folder)


@pytest.fixture(scope="module")
def requests(model):
    """200 mixed requests: short and long, many with a common beginning, some that a stop token ends."""
    rng = np.random.default_rng(0)
    stems = [rng.integers(1, served.VOCAB, 40).tolist() for _ in range(4)]
    made = []
    for _ in range(COUNT):
        stem = stems[rng.integers(4)][: rng.integers(0, 40)] if rng.random() < 0.5 else []
        prompt = stem + rng.integers(1, served.VOCAB, int(rng.integers(1, 32))).tolist()
        room = int(rng.integers(1, 20))
        made.append(Asked(prompt, room, model.generate([prompt], max_new_tokens=room)[0].tolist()))
    assert len({tuple(one.tokens) for one in made}) > COUNT * 0.8, "the model does not say the same to everyone"
    return made


def check_empty(engine):
    parts = engine.parts
    assert not engine._of and not engine._flying and parts.scheduler.unfinished == 0 and not parts._cached
    for pool in (*parts.pools, *parts.router_pools):
        assert pool.available == pool.pages
    assert parts.transfers.pending == 0 and parts.transfers._room == engine.options.ahead


@pytest.fixture(scope="module")
def shared(requests):
    """Made after the requests, whose generation compiles too."""
    shared = served.Shared(Runner, limits=Limits(batch_requests=8, batch_tokens=32, chunk=32))
    yield shared
    shared.end()


@pytest.fixture(autouse=True)
def one_runner(shared, monkeypatch):
    monkeypatch.setattr(parts, "Runner", shared)


def compare(folder, requests, place, seed):
    """What a pair of policies makes of them is what part 1 makes of each alone."""
    schedule, residency = PAIRS[place]
    budget = BUDGETS[place % 4]
    options = OPTIONS | dict(
        schedule=schedule, residency=residency, expert_memory=budget, chunk=[16, 5, 32][place % 3],
        mode="column" if budget == "1.0x" else "layer",
    )  # fmt: skip
    with Engine(folder, **options) as engine:
        before = engine.stats()["compiles_after_start"]
        tied = engine.parts.bank.least("column") * 2 >= engine.parts.bank.items
        assert engine.parts.runner.resident == (budget == "1.0x" and tied)
        with jax.transfer_guard("disallow"):
            reasons = served.serve(engine, requests, np.random.default_rng(seed))
        stats = engine.stats()
        check_empty(engine)
    assert stats["compiles_after_start"] == before and stats["programs"] <= 24
    assert {"length", "stop"} & set(reasons)
    return reasons, stats


def check_all(reasons, stats):
    assert stats["preemptions"] > 0 and "cancelled" in reasons and stats["tokens_from_prefix"] > 0


@pytest.mark.parametrize("place", range(len(PAIRS)), ids=["+".join(pair) for pair in PAIRS])
def test_equal_to_one_at_a_time(folder, requests, place):
    """The first pair of policies serves all of the requests, the others some (all of them in the slow test)."""
    reasons, stats = compare(folder, requests if place == 0 else requests[place * 9 :][:15], place, place)
    if place == 0:
        check_all(reasons, stats)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(PAIRS)), ids=["+".join(pair) for pair in PAIRS])
def test_all_equal_to_one_at_a_time(folder, requests, place):
    check_all(*compare(folder, requests, place, 100 + place))


SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=11, stop_tokens=(7,))


def test_sampled_text_depends_on_its_seed_alone(folder, model, requests):
    """Alone or in any batch, by any policy: the same; and what part 1 draws with that seed for its first row."""
    prompts = [one.prompt for one in requests[:12]]
    each = [dataclasses.replace(SAMPLED, seed=100 + i, n=1 + i % 3) for i in range(12)]
    with Engine(folder, **OPTIONS) as engine:
        alone = [engine.generate([p], s)[0] for p, s in zip(prompts, each)]
    order = np.random.default_rng(1).permutation(12)
    with Engine(folder, **OPTIONS | dict(schedule="longest-queue", expert_memory="0.3x", chunk=5)) as engine:
        for one in requests[20:30]:
            engine.add_request(one.prompt, SamplingParams(max_new_tokens=15, temperature=1.0))
        mixed = engine.generate([prompts[i] for i in order], [each[i] for i in order])
    for place, i in enumerate(order):
        assert [c.tokens for c in mixed[place].choices] == [c.tokens for c in alone[i].choices]
    stop = [7, *model.stop_tokens]
    for i in (0, 3, 5):  # one choice, one choice, three: choice c draws what row c of a batch draws
        options = dict(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=100 + i, stop_tokens=stop)
        rows = model.generate([prompts[i]] * each[i].n, **options)
        assert [row.tolist() for row in rows] == [choice.tokens for choice in alone[i].choices]
    assert len({tuple(choice.tokens) for out in alone for choice in out.choices}) > 18


def test_logprobs(folder, model, requests):
    prompt = requests[0].prompt
    with Engine(folder, **OPTIONS) as engine:
        out = engine.generate([prompt], SamplingParams(max_new_tokens=4, logprobs=3, ignore_eos=True))[0].choices[0]
    logits = model.logits([prompt + out.tokens])[0].astype(np.float64)
    rows = logits[len(prompt) - 1 :][:4]
    logprobs = rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1)[:, None]
    assert out.scores is not None and [score.token for score in out.scores] == out.tokens
    for score, row in zip(out.scores, logprobs):
        np.testing.assert_allclose(score.logprob, row[score.token], atol=1e-4)
        best = np.argsort(-row)[:3]
        assert [token for token, _ in score.best] == best.tolist()
        np.testing.assert_allclose([value for _, value in score.best], row[best], atol=1e-4)


def live_memory():
    """(arrays on the device, bytes of this process)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(jax.live_arrays()), pages * resource.getpagesize()


def soak(folder, model, count, growth):
    """Requests of every kind, many cancelled: nothing is left of them, and memory does not grow with their number."""
    rng, ended, marks = np.random.default_rng(12), set(), []
    stems = [rng.integers(1, served.VOCAB, 40).tolist() for _ in range(6)]
    options = OPTIONS | dict(schedule="expert-aware", residency="lookahead", expert_memory="0.45x", kv_memory="64KiB")
    with Engine(folder, **options) as engine, jax.transfer_guard("disallow"):
        added, live, compiled = 0, [], engine.stats()["compiles_after_start"]
        while len(ended) < count:
            for _ in range(min(int(rng.integers(0, 6)), count - added, 60 - engine.unfinished)):
                stem = stems[rng.integers(6)][: rng.integers(0, 40)] if rng.random() < 0.5 else []
                sampling = SamplingParams(
                    max_new_tokens=int(rng.integers(1, 12)), temperature=float(rng.choice([0.0, 1.0])),
                    seed=int(rng.integers(99)), n=int(rng.choice([1, 1, 1, 2])),
                    stop=("the",) if rng.random() < 0.1 else (), logprobs=2 if rng.random() < 0.1 else None,
                    repetition_penalty=float(rng.choice([1.0, 1.3])),
                )  # fmt: skip
                live.append(engine.add_request(stem + rng.integers(1, served.VOCAB, 8).tolist(), sampling))
                added += 1
            if live and rng.random() < 0.15:
                engine.cancel(live.pop(rng.integers(len(live))))
            for update in engine.step():
                if update.reason and update.id not in engine._asked and update.id not in ended:
                    ended.add(update.id)
                    live = [number for number in live if number != update.id]
                    if len(ended) in (count // 4, count):
                        marks.append(live_memory())
        while engine.unfinished:
            engine.step()
        check_empty(engine)
        stats = engine.stats()
        assert stats["compiles_after_start"] == compiled and stats["programs"] <= 24
        page_of = engine.parts.residency.slot_of
        resident = page_of[page_of >= 0]
        assert len(set(resident.tolist())) == len(resident) <= stats["expert_slots"], "a slot holds one page"
    assert stats["requests_cancelled"] > count // 40 and stats["preemptions"] > 0
    (arrays, size), (arrays_after, size_after) = marks
    assert arrays_after <= arrays + 40, "arrays of steps in flight at most"
    assert size_after - size < growth


def test_nothing_is_left_of_requests(folder, model):
    soak(folder, model, 200, growth=60e6)


@pytest.mark.slow
def test_nothing_is_left_of_5000_requests(folder, model):
    soak(folder, model, 5000, growth=60e6)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["tied", "separate"])
def test_half_precision(tmp_path, monkeypatch, storage):
    """bfloat16 weights and keys: the same text whatever the budget and the batch; programs of its own."""
    monkeypatch.setattr(parts, "Runner", Runner)
    folder = served.write(tmp_path / storage, storage=storage)
    prompts = [np.random.default_rng(i).integers(1, served.VOCAB, 10 + i).tolist() for i in range(6)]
    sampling, made = SamplingParams(max_new_tokens=8, ignore_eos=True), []
    for options in (dict(expert_memory="1.0x"), dict(expert_memory="0.3x", schedule="fcfs", residency="lru")):
        with Engine(folder, **OPTIONS | options | dict(dtype="bfloat16")) as engine:
            made.append([out.tokens for out in engine.generate(prompts, sampling)])
            assert engine.stats()["compiles_after_start"] == 0
            assert engine.generate([prompts[0]], sampling)[0].tokens == made[-1][0]
    assert made[0] == made[1]
