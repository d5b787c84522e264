"""Serving with experts spread over four devices: the tokens of one-at-a-time generation, whatever the experts, policies
and mix; no token dropped, nothing compiled after the start, one clear line for what cannot be spread."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import served
from run_rows import FAMILIES, write
from safetensors.numpy import load_file, save_file

from readme_jax import api, hf, jaxprs
from readme_jax.config import ConfigError, DataError
from readme_jax.serving import mesh_runner, parts, segments
from readme_jax.serving.engine import Engine
from readme_jax.serving.mesh_runner import MeshRunner, cut, sizes
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import Request, SamplingParams, Work

DEVICES, EXPERTS, COUNT = 4, 8, 40
OPTIONS = dict(
    mesh_expert=DEVICES, kv_memory="28KiB", router_memory="160KiB", kv_page=4, expert_page=4, batch_requests=8,
    batch_tokens=32, chunk=16, max_live=24, context=64,
)  # fmt: skip


class Shared:
    """A runner for many engines, one after the other."""

    def __init__(self):
        self._runner = None

    def __call__(self, folder, bank, **options):
        if self._runner is None:
            self._runner = MeshRunner(folder, bank, **options)
            self._runner.compile(False)
        return self

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def compile(self, progress):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write(tmp_path_factory.mktemp("served"), storage="separate", experts=EXPERTS)


@pytest.fixture(scope="module")
def skewed(folder, tmp_path_factory):
    """The same model with a router that sends every token to the last expert."""
    out = tmp_path_factory.mktemp("skewed")
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    name = next(path.name for path in out.glob("*.safetensors") if "readme.router.head.bias" in load_file(path))
    tensors = load_file(out / name)
    tensors["readme.router.head.bias"][-1] = 1e4
    save_file(tensors, out / name, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def models(folder, skewed):
    return {"mixed": api.load(folder), "skewed": api.load(skewed)}


@dataclasses.dataclass
class Asked:
    """A request and what part 1 makes of it, alone."""

    prompt: list
    room: int
    tokens: list


def ask(model, count, seed):
    """Mixed requests: short and long, many with a common beginning."""
    rng, made = np.random.default_rng(seed), []
    stems = [rng.integers(1, served.VOCAB, 24).tolist() for _ in range(3)]
    for _ in range(count):
        stem = stems[rng.integers(3)][: rng.integers(0, 16)] if rng.random() < 0.5 else []
        prompt = stem + rng.integers(1, served.VOCAB, int(rng.integers(1, 16))).tolist()
        room = int(rng.integers(1, 25))
        made.append(Asked(prompt, room, model.generate([prompt], max_new_tokens=room)[0].tolist()))
    return made


@pytest.fixture(scope="module")
def requests(models):
    return {"mixed": ask(models["mixed"], COUNT, 0), "skewed": ask(models["skewed"], 12, 1)}


@pytest.fixture(scope="module")
def shared(requests):
    """A runner a model. Made after the requests, whose generation compiles too."""
    shared = {"mixed": Shared(), "skewed": Shared()}
    yield shared
    for one in shared.values():
        if one._runner is not None:
            one._runner.close()


def serve(engine, requests, rng, cancel):
    """Serve them while they arrive, some cancelled; every token is the one that part 1 gives."""
    ids, got, ended, todo = {}, {}, {}, list(requests)
    while todo or engine.unfinished:
        for _ in range(min(len(todo), int(rng.integers(0, 6)))):
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
    assert parts._asked == [0] * DEVICES and not any(parts.runner._pieces)
    for pool in (*parts.pools, *parts.router_pools):
        assert pool.available == pool.pages


def run(folder, shared, requests, monkeypatch, seed, cancel=0.05, **options):
    monkeypatch.setattr(parts, "MeshRunner", shared)
    with Engine(folder, **OPTIONS | options) as engine:
        before, used = engine.stats()["compiles_after_start"], set()
        step = engine.parts.runner._runner.step

        def watch(batch, plan, before_pass):
            used.update(work.request.device for work in batch.works)
            return step(batch, plan, before_pass)

        monkeypatch.setattr(engine.parts.runner, "step", watch, raising=False)
        with jax.transfer_guard("disallow"):
            reasons = serve(engine, requests, np.random.default_rng(seed), cancel)
        stats = engine.stats()
        check_empty(engine)
    assert stats["compiles_after_start"] == before and stats["programs"] <= 24
    assert used == set(range(DEVICES)), "all devices have rows"
    assert stats["bytes_loaded"] == 0 and stats["hit_ratio_bytes"] == 1
    return reasons, stats


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_to_one_at_a_time(folder, shared, requests, monkeypatch, schedule):
    residency = RESIDENCIES[SCHEDULES.index(schedule) % len(RESIDENCIES)]
    options = dict(schedule=schedule, residency=residency, chunk=[16, 5][SCHEDULES.index(schedule) % 2])
    reasons, stats = run(folder, shared["mixed"], requests["mixed"], monkeypatch, 3, **options)
    assert stats["preemptions"] > 0 and stats["tokens_from_prefix"] > 0
    assert "length" in reasons and "cancelled" in reasons


def test_all_tokens_to_one_expert(skewed, shared, requests, monkeypatch):
    _, stats = run(skewed, shared["skewed"], requests["skewed"], monkeypatch, 4, cancel=0)
    assert stats["unique_experts_per_batch"] == 1
