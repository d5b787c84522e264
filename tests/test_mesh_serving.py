"""Serving with experts spread over four devices: the tokens of one-at-a-time generation, whatever the experts, policies
and mix; no token dropped, nothing compiled after the start, one clear line for what cannot be spread."""

import dataclasses

import jax
import numpy as np
import pytest
import served
from run_rows import FAMILIES, write
from safetensors.numpy import load_file, save_file

from readme_jax import api
from readme_jax.config import ConfigError, DataError
from readme_jax.serving import mesh_segments, parts, segments
from readme_jax.serving.engine import Engine
from readme_jax.serving.mesh_runner import MeshRunner
from readme_jax.serving.mesh_segments import cut, sizes
from readme_jax.serving.options import RESIDENCIES, SCHEDULES
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import Batch, Request, SamplingParams, Work

DEVICES, EXPERTS, COUNT = 4, 8, 40
OPTIONS = dict(
    mesh_expert=DEVICES, kv_memory="28KiB", router_memory="160KiB", kv_page=4, expert_page=4, batch_requests=8,
    batch_tokens=32, chunk=16, max_live=24, context=64,
)  # fmt: skip


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
    shared = {name: served.Shared(MeshRunner) for name in ("mixed", "skewed")}
    yield shared
    for one in shared.values():
        one.end()


@pytest.fixture
def runner(folder, shared, monkeypatch):
    """The runner of the first model, made if no test before made it."""
    monkeypatch.setattr(parts, "MeshRunner", shared["mixed"])
    with Engine(folder, **OPTIONS):
        return shared["mixed"]._runner


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
            reasons = served.serve(engine, requests, np.random.default_rng(seed), cancel)
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


def test_sampled_text_depends_on_its_seed_alone(folder, models, shared, requests, monkeypatch):
    monkeypatch.setattr(parts, "MeshRunner", shared["mixed"])
    prompts = [one.prompt for one in requests["mixed"][:6]]
    with Engine(folder, **OPTIONS) as engine:
        options = dict(max_new_tokens=10, temperature=0.9, top_k=40, top_p=0.95)
        each = [SamplingParams(seed=50 + i, n=2, logprobs=3, **options) for i in range(6)]
        outs = engine.generate(prompts, each)
        bent = engine.generate([prompts[0]], SamplingParams(max_new_tokens=10, repetition_penalty=50.0))[0]
    model = models["mixed"]
    for i, out in enumerate(outs):
        rows = model.generate([prompts[i]] * 2, seed=50 + i, **options)
        assert [choice.tokens for choice in out.choices] == [row.tolist() for row in rows]
    assert len({*prompts[0], *bent.tokens}) == len({*prompts[0]}) + len(bent.tokens), "nothing is said twice"
    out = outs[0].choices[0]
    logits = model.logits([prompts[0] + out.tokens])[0].astype(np.float64)[len(prompts[0]) - 1 :][: len(out.tokens)]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert out.scores is not None and out.scores
    for score, row in zip(out.scores, logprobs):
        np.testing.assert_allclose(score.logprob, row[score.token], atol=1e-4)
        np.testing.assert_allclose([value for _, value in score.best], np.sort(row)[::-1][:3], atol=1e-4)


def family(folder, name, tmp_path):
    """A folder of four separate experts of this family with a tokenizer."""
    write(tmp_path, dataclasses.replace(FAMILIES[name], vocab=served.VOCAB), storage="separate", experts=4)
    for path in folder.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return api.Model(tmp_path)


@pytest.mark.parametrize("name, devices", [("llama biases", 2), ("qwen2", 4)])
def test_families(folder, tmp_path, name, devices):
    """Biases of the FFN and two experts a device; sliding windows and one expert a device."""
    prompts, model = [[5, 9, 130], [7] * 19 + [11, 120, 3], list(range(20, 45)), [1]], family(folder, name, tmp_path)
    options = dict(batch_requests=2, batch_tokens=16, chunk=8, context=64, kv_page=4, kv_memory="64KiB")
    with Engine(tmp_path, mesh_expert=devices, **options) as engine:
        outs = engine.generate(prompts, SamplingParams(max_new_tokens=8, ignore_eos=True))
    expected = [model.generate([p], max_new_tokens=8, stop_tokens=[])[0].tolist() for p in prompts]
    assert [out.tokens for out in outs] == expected


def test_bfloat16_agrees_with_float32_nearly(folder, tmp_path):
    prompt, model = list(range(20, 45)), family(folder, "qwen2", tmp_path)
    options = dict(batch_requests=1, batch_tokens=8, chunk=8, context=64, kv_page=4, kv_memory="64KiB")
    with Engine(tmp_path, mesh_expert=2, dtype="bfloat16", **options) as engine:
        out = engine.generate([prompt], SamplingParams(max_new_tokens=1, logprobs=0, ignore_eos=True))[0].choices[0]
    logits_V = model.logits([prompt])[0, -1].astype(np.float64)
    logprob_V = logits_V - np.log(np.exp(logits_V).sum())
    np.testing.assert_allclose(out.scores[0].logprob, logprob_V[out.tokens[0]], atol=0.2)


def test_bytes_read(runner, requests):
    """Of a step: the experts that have tokens, once, and everything else on every device."""
    request = Request(requests["mixed"][0].prompt[:3], SamplingParams(), device=1)
    request.pages, request.router_pages = [runner.kv_pages], [runner.router_pages]
    request.experts = [6, 1, 6]
    for count, experts, head in ((2, 2, 0), (1, 1, DEVICES)):
        before = runner.bytes_read
        runner.fetch(runner.step(Batch((Work(request, request.computed, count),)), None))
        request.computed += count
        embed, layers, channels = served.EMBED, served.LAYERS, served.CHANNELS
        other = 4 * (embed * 64 + 32 * embed + 2 * embed)
        kv = 2 * 2 * 8 * 4 * request.computed
        ffn = experts * 3 * channels * embed * 4
        expected = layers * (DEVICES * other + kv + ffn) + head * served.VOCAB * embed * 4
        assert runner.bytes_read - before == expected


# ---- what is compiled ---------------------------------------------------------------------------------


def test_a_layer_is_two_exchanges_and_no_sort(runner):
    """Argsort on a device would be a trap for whoever differentiates; no weight of an expert moves."""
    layers = {key: program.as_text() for key, program in runner._programs.items() if key[0] == "layer"}
    assert len(layers) >= 8
    for key, text in layers.items():
        assert text.count(" all-to-all(") + text.count(" all-to-all-start(") == 2, key
        assert " sort(" not in text and " all-gather(" not in text, key
        assert text.count(" all-reduce(") <= 1, "the sum over `model`, which is one device"


@pytest.mark.parametrize("batch, chunk", [(1, 2), (8, 16), (16, 128), (64, 512), (1000, 4096)])
def test_programs_are_few_and_take_any_skew(batch, chunk):
    limits = Limits(batch_requests=batch, batch_tokens=max(batch, chunk), chunk=chunk)
    for devices in (2, 4, 8):
        g = mesh_segments.grid(limits, 8192, 16)
        layers = [(shape, size) for shape in g.shapes for size in sizes(*shape, devices)]
        assert len(layers) + 2 * len(g.lengths) + len(g.rungs) <= 24
        for b, t in g.shapes:
            ladder = sizes(b, t, devices)
            assert ladder[-1] == b * t and list(ladder) == sorted({*ladder}) and ladder[0] * devices >= b * t
        assert g.rungs[-1] == batch and g.lengths[-1] == chunk


def works(*pairs):
    """(device, tokens) -> works."""
    out = []
    for device, count in pairs:
        request = Request([1] * count, SamplingParams(), device=device)
        request.experts = [0] * count
        out.append(Work(request, 0, count))
    return out


def test_segments():
    g = segments.Grid(page=4, width=8, rungs=(1, 2, 8), lengths=(4, 16))
    assert cut(g, works((0, 1)), 2) == [((1, 1), [[0], []])]
    batch = works((1, 1), (0, 3), (1, 1), (1, 9), (1, 1), (0, 1), (1, 4))
    assert cut(g, batch, 2) == [((8, 1), [[5], [0, 2, 4]]), ((1, 16), [[1], [3]]), ((1, 4), [[], [6]])]
    assert cut(g, works((1, 16), (2, 2)), 3) == [((1, 16), [[], [0], [1]])]


# ---- what cannot be spread ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mesh_expert=3), r"^experts=8 must be a multiple of mesh_expert=3$"),
        (dict(mesh_expert=16), r"^mesh_expert=16 needs as many devices of this process, there are 8$"),
        (
            dict(mesh_expert=4, expert_memory="0.5x"),
            r"^expert_memory='0.5x': with mesh_expert=4 all experts stay on the devices: 1.0x, 393216 bytes in all$",
        ),
        (dict(mesh_expert=4, expert_memory="1KiB"), r"^expert_memory='1KiB': with mesh_expert=4 all experts stay on"),
        (dict(mesh_expert=0), r"^mesh_expert=0 must be a whole number, at least 1$"),
        (dict(mesh_expert=2.0), r"^mesh_expert=2.0 must be a whole number, at least 1$"),
    ],
    ids=str,
)
def test_what_cannot_be_spread(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(folder, **options)


def test_tied_experts_cannot_be_spread(tmp_path):
    served.write(tmp_path, experts=4)
    with pytest.raises(ConfigError, match=r"mesh_expert=4 needs separate experts: `readme-jax separate`$"):
        Engine(tmp_path, mesh_expert=4)


def test_a_request_must_fit_on_one_device(folder, shared, monkeypatch):
    monkeypatch.setattr(parts, "MeshRunner", shared["mixed"])
    with Engine(folder, **OPTIONS) as engine:
        message = r"a request of 58 tokens needs 15 pages; kv_memory='28KiB' holds 14"
        with pytest.raises(DataError, match=message):
            engine.add_request([1] * 50, SamplingParams(max_new_tokens=8))
        assert engine.stats()["kv_pages"] == 14 * DEVICES


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_lower_for_accelerators(runner, platform):
    """The largest of each kind; what there is no machine for is at least translated."""
    kinds = {}
    with jax.set_mesh(runner._mesh):
        for job in runner._jobs():
            kinds[job.key[0]] = job
        for name, job in kinds.items():
            text = jax.jit(job.function).trace(*job.arguments).lower(lowering_platforms=(platform,)).as_text()
            assert text.count("stablehlo.all_to_all") == (2 if name == "layer" else 0)
