"""A small routed checkpoint for the tests of serving, written at once: random weights, experts and router."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import tiny

from readme_jax import hf
from readme_jax.config import ExpertConfig, ModelConfig, RouterConfig
from readme_jax.models import router
from readme_jax.serving.request import SamplingParams

LAYERS, EMBED, MLP = 4, 32, 64
EXPERTS, CHANNELS = 5, 32
VOCAB, CONTEXT = 384, 512


def write(folder: Path, *, storage: str = "tied", routed: bool = True, experts: int = EXPERTS) -> Path:
    """tied: experts of half the FFN that overlap by two thirds; separate: each has channels of its own."""
    cfg = tiny.write_model(folder, layer=LAYERS, embed=EMBED, mlp=MLP, seed=3)
    rng = np.random.default_rng(4)
    params = hf.load_params(folder)[0]
    if storage == "separate":
        cfg: ModelConfig = dataclasses.replace(cfg, mlp=experts * CHANNELS)
        for name in ("w_gate", "w_up", "w_down"):
            params["layers"][name] = np.concatenate([params["layers"][name][:, :CHANNELS]] * experts, axis=1)
            params["layers"][name] += rng.normal(0, 0.1, params["layers"][name].shape).astype(np.float32)
        table_LEC = np.arange(experts * CHANNELS).reshape(1, experts, CHANNELS).repeat(LAYERS, 0)
    else:
        score_LEF = rng.normal(0, 1.5, (LAYERS, 1, MLP)) + rng.normal(size=(LAYERS, experts, MLP))
        table_LEC = np.sort(np.argsort(-score_LEF)[..., :CHANNELS])
    carved = ExpertConfig(
        experts=experts, channels=CHANNELS, storage=storage, names=tuple(f"e{i}" for i in range(experts)),
        importance="energy", carving="domain" if experts > 1 else "static",
    )  # fmt: skip
    shape = RouterConfig(width=32, heads=2) if routed else None
    gate = None
    if shape is not None:
        gate = router.init_params(shape, params["embedding"], experts, 5)
        gate["embedding"] = rng.normal(size=gate["embedding"].shape).astype(np.float32)
        gate["head"] = rng.normal(size=gate["head"].shape).astype(np.float32)
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(cfg, {}, carved, shape)))
    with hf.Writer(folder) as writer:
        hf.save_params(writer, cfg, params, table_LEC.astype(np.int32), gate)
    return folder


class Shared:
    """A runner that many engines use one after the other, so that its programs are compiled once; another for engines
    whose experts all stay in their place.

    A pool of expert pages has room for all of them, of which an engine's budget uses some. What earlier engines left in
    pool and pages stays there, as in an engine that has served for long.
    """

    def __init__(self, kind, **largest):
        self._kind, self._runner, self._largest, self._made = kind, None, largest, {}

    def __call__(self, folder, bank, **options):
        resident = options.get("resident")
        if resident not in self._made:
            options |= self._largest | ({"slots": bank.total} if "slots" in options else {})
            self._made[resident] = self._kind(folder, bank, **options)
            self._made[resident].compile(False)
        self._runner = self._made[resident]
        return self

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def compile(self, progress):
        pass

    def close(self):
        pass

    def end(self):
        for runner in self._made.values():
            runner.close()


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
