"""The engine on a real tiny model: equal to one-at-a-time generation whatever the policies, budgets, chunks and mix."""

import dataclasses

import jax
import numpy as np
import pytest
import served

from readme_jax import api
from readme_jax.serving.engine import Engine
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.request import SamplingParams

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
        room = int(rng.integers(1, 24))
        made.append(Asked(prompt, room, model.generate([prompt], max_new_tokens=room)[0].tolist()))
    assert len({tuple(one.tokens) for one in made}) > COUNT * 0.8, "the model does not say the same to everyone"
    return made


def serve(engine, requests, rng, cancel=0.03):
    """Serve them while they arrive, some cancelled; every token is the one that part 1 gives."""
    ids, got, ended, todo = {}, {}, {}, list(requests)
    while todo or engine.unfinished:
        for _ in range(min(len(todo), int(rng.integers(0, 5)))):
            one = todo.pop()
            number = engine.add_request(one.prompt, SamplingParams(max_new_tokens=one.room))
            ids[number], got[number] = one, []
        if rng.random() < cancel and engine.unfinished:
            engine.cancel(int(rng.choice([*engine._asked])))
        for update in engine.step():
            got[update.id] += update.tokens
            if update.reason:
                ended[update.id] = update.reason
    assert ended.keys() == ids.keys()
    for number, one in ids.items():
        if ended[number] == "cancelled":
            assert one.tokens[: len(got[number])] == got[number]
        else:
            assert got[number] == one.tokens, (number, one)
    return list(ended.values())


def check_empty(engine):
    parts = engine.parts
    assert not engine._of and not engine._flying and parts.scheduler.unfinished == 0 and not parts._cached
    for pool in (parts.pool, parts.router_pool):
        assert pool.available == pool.pages
    assert parts.transfers.pending == 0 and parts.transfers._room == engine.options.ahead


@pytest.mark.parametrize("place", range(len(PAIRS)), ids=["+".join(pair) for pair in PAIRS])
def test_equal_to_one_at_a_time(folder, requests, place):
    """Every pair of policies serves some of the requests, every fifth pair all of them (all do in the slow test)."""
    schedule, residency = PAIRS[place]
    rng = np.random.default_rng(place)
    some = requests if place % 5 == 0 else requests[place * 10 :][:25]
    options = OPTIONS | dict(
        schedule=schedule, residency=residency, expert_memory=BUDGETS[place % 4], chunk=[16, 5, 32][place % 3],
        mode=["layer", "column"][place % 2 and BUDGETS[place % 4] != "0.3x"],
    )  # fmt: skip
    with jax.transfer_guard("disallow"), Engine(folder, **options) as engine:
        reasons = serve(engine, some, rng)
        stats = engine.stats()
        check_empty(engine)
    assert "length" in reasons
    assert stats["compiles_after_start"] == 0 and stats["programs"] <= 24
    if place % 5 == 0:
        assert stats["preemptions"] > 0 and "cancelled" in reasons and stats["tokens_from_prefix"] > 0
