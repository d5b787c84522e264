"""The engine's loop over a runner that checks every page: admission, preemption, sharing, cancels, waves, no leaks."""

import numpy as np
import pytest
import served
from fake_runner import VOCAB, FakeRunner, expected, expert_of

from readme_jax import api
from readme_jax.serving import parts
from readme_jax.serving.engine import Engine
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.recorder import Recorder
from readme_jax.serving.request import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return api.load(served.write(tmp_path_factory.mktemp("served")))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(parts, "Runner", FakeRunner)


SMALL = dict(
    kv_memory="64KiB", router_memory="80KiB", kv_page=4, expert_page=4, batch_requests=4, batch_tokens=24, chunk=10,
    max_live=8, context=120,
)  # fmt: skip


def prompts(rng, count):
    """Of all lengths, many with the same beginning."""
    stems = [rng.integers(1, VOCAB, 30).tolist() for _ in range(3)]
    made = []
    for _ in range(count):
        stem = stems[rng.integers(3)][: rng.integers(0, 30)] if rng.random() < 0.6 else []
        made.append(stem + rng.integers(1, VOCAB, rng.integers(1, 30)).tolist())
    return made


def check_empty(engine):
    """Nothing is left behind."""
    parts = engine.parts
    assert engine.unfinished == 0 and not engine._of and not engine._flying
    assert parts.scheduler.unfinished == 0 and parts.scheduler.flying == 0 and not parts._cached and not parts._routing
    for pool in (parts.pool, parts.router_pool):
        assert pool.available == pool.pages
    assert parts.transfers.pending == 0 and parts.transfers._room == engine.options.ahead


def run(engine, rng, count, cancel=0.15):
    """Serve requests that come while others run, some cancelled; compare all tokens with one at a time."""
    wanted, got, ended = {}, {}, {}
    todo = prompts(rng, count)
    while todo or engine.unfinished:
        for _ in range(min(len(todo), int(rng.integers(0, 3)))):
            prompt, room, n = todo.pop(), int(rng.integers(1, 25)), int(rng.choice([1, 1, 1, 3]))
            number = engine.add_request(prompt, SamplingParams(max_new_tokens=room, n=n))
            for choice in range(n):
                wanted[number, choice] = prompt, expected(prompt, room)
                got[number, choice] = []
        if rng.random() < cancel and engine.unfinished:
            engine.cancel(int(rng.choice([*engine._asked])))
        for update in engine.step():
            assert (update.id, update.choice) not in ended
            got[update.id, update.choice] += update.tokens
            if update.reason:
                ended[update.id, update.choice] = update
    assert ended.keys() == wanted.keys()
    for key, (prompt, tokens) in wanted.items():
        reason, usage = ended[key].reason, ended[key].usage
        if reason == "cancelled":
            assert tokens[: len(got[key])] == got[key]
        else:
            assert got[key] == tokens
            assert usage.completion_tokens == len(tokens) + (reason == "stop") and usage.prompt_tokens == len(prompt)
            every = (prompt + tokens + [0])[: len(prompt) + usage.completion_tokens - 1]
            experts = [expert_of(every[: i + 1]) for i in range(len(every))]
            assert usage.experts == {e: experts.count(e) for e in set(experts)}
    return [u.reason for u in ended.values()]


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_output_depends_on_no_policy(model, schedule, residency):
    rng = np.random.default_rng(SCHEDULES.index(schedule) * 4 + RESIDENCIES.index(residency))
    memory = rng.choice(["0.3x", "0.5x", "1.0x"])
    with Engine(model, schedule=schedule, residency=residency, expert_memory=str(memory), **SMALL) as engine:
        reasons = run(engine, rng, 40)
        assert {"stop", "length", "cancelled"} <= set(reasons)
        check_empty(engine)
        moved, planned = engine.parts.transfers.moved, engine.parts.residency.counters
        assert moved.loads == planned.loads and moved.bytes == planned.bytes_loaded > 0
