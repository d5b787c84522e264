"""What bad input gets from the engine: one clear line with name, value and rule, before any work."""

import shutil

import numpy as np
import pytest
import served
from fake_runner import FakeRunner

from readme_jax import api
from readme_jax.config import CheckpointError, ConfigError, DataError
from readme_jax.serving import parts
from readme_jax.serving.engine import Engine
from readme_jax.serving.options import EngineOptions, memory_bytes
from readme_jax.serving.request import SamplingParams

SMALL = dict(kv_memory="64KiB", router_memory="80KiB", kv_page=4, context=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write(tmp_path_factory.mktemp("served"))


@pytest.fixture
def engine(folder, monkeypatch):
    monkeypatch.setattr(parts, "Runner", FakeRunner)
    with Engine(folder, **SMALL) as engine:
        yield engine
        assert engine.unfinished == 0 and engine.parts.scheduler.unfinished == 0, "nothing of a refused request is left"


# ---- the model ----


@pytest.mark.parametrize(
    "stage, message",
    [
        ("dense", r"dense: a dense model has no experts to serve by; carve it first, or use `readme-jax generate`"),
        ("carved", r"carved: 3 experts but no router; train one with `readme-jax alternate`"),
    ],
)
def test_models_that_cannot_be_served(stages, stage, message):
    with pytest.raises(ConfigError, match=message):
        Engine(getattr(stages, stage))


def test_no_model():
    with pytest.raises(Exception, match="nowhere") as error:
        Engine("./nowhere/at-all")
    assert "\n" not in str(error.value)


# ---- options ----


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(schedule="fifo"),
            "schedule='fifo' is not one of fcfs, decode-first, prefill-first, longest-queue, expert",
        ),
        (dict(residency="mru"), "residency='mru' is not one of lookahead, lru, lfu, random"),
        (dict(mode="row"), "mode='row' is not one of layer, column"),
        (dict(dtype="int8"), "dtype='int8' is not one of float32, bfloat16"),
        (
            dict(expert_memory="half"),
            "expert_memory='half' must be a size such as 2GiB, 500MB or a number of bytes, or a",
        ),
        (dict(expert_memory="2x"), r"expert_memory='2x': a share must be in \(0, 1\]x"),
        (dict(expert_memory="0x"), r"expert_memory='0x': a share must be in"),
        (dict(expert_memory=True), "expert_memory=True must be a size"),
        (dict(expert_memory="0"), "expert_memory='0' must be above 0"),
        (dict(kv_memory="0.5x"), "kv_memory='0.5x' must be a size such as 2GiB, 500MB or a number of bytes$"),
        (dict(kv_memory="-1GiB"), "kv_memory='-1GiB' must be a size"),
        (dict(batch_requests=0), "batch_requests=0 must be a whole number, at least 1"),
        (dict(chunk=2.5), "chunk=2.5 must be a whole number"),
        (dict(max_live=True), "max_live=True must be a whole number"),
        (dict(batch_requests=32, batch_tokens=16, chunk=8), "batch_tokens=16 must hold one token of each of batch_req"),
        (dict(chunk=1000), "chunk=1000 must not exceed batch_tokens=256"),
        (dict(max_wait=0.5), "max_wait=0.5 must be at least 1, or none"),
        (dict(lookahead=-1), "lookahead=-1 must be a whole number, at least 0"),
        (dict(expert_memroy="1x"), "expert_memroy: no such option of Engine; known: ahead, batch_requests, "),
    ],
    ids=str,
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Engine("not looked at", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(expert_memory=1000), r"expert_memory=1000 bytes must hold the channels of the largest expert in a layer, "
         r"shared ones included: at least \d+ bytes \(\d+ pages of 6144\)"),
        (dict(expert_memory="0.3x", mode="column"), r"expert_memory=\d+ bytes must hold .* in all layers, .* at least"),
        (dict(context=513), "context=513 exceeds the model's 512"),
        (dict(kv_memory="100"), "kv_memory='100' must hold a page of 16 tokens: at least 8192 bytes"),
        (dict(router_memory="100"), "router_memory='100' must hold a page of 16 tokens: at least 4096 bytes"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_the_model_refuses(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(folder, **options)


def test_the_least_budget_that_is_named_works(folder, monkeypatch):
    monkeypatch.setattr(parts, "Runner", FakeRunner)
    with pytest.raises(ConfigError) as error:
        Engine(folder, expert_memory=1000, **SMALL)
    least = int(str(error.value).split("at least ")[1].split()[0])
    with Engine(folder, expert_memory=least, **SMALL) as engine:
        assert len(engine.generate([[5, 6]], SamplingParams(max_new_tokens=3, ignore_eos=True))[0].tokens) == 3
    with pytest.raises(ConfigError):
        Engine(folder, expert_memory=least - 1, **SMALL)


@pytest.mark.parametrize(
    "text, size",
    [("2GiB", 2 << 30), ("500MB", 500_000_000), (" 1.5 kib ", 1536), ("7", 7), (7, 7), ("0.25x", 100), (".5X", 200)],
)
def test_sizes(text, size):
    assert memory_bytes(text, "it", whole=400) == size


def test_defaults_are_sound():
    assert EngineOptions() == EngineOptions(schedule="expert-aware", residency="lookahead")


# ---- requests ----


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1] * 100, dict(max_new_tokens=21), r"100 tokens \+ max_new_tokens=21 exceed the context of 120"),
        ([1, 384], {}, "token id 384 is outside the vocabulary of 384"),
        ([-1], {}, "token id -1 is outside the vocabulary"),
        ([1.5], {}, "a prompt must be a text or a list of token ids"),
        (None, {}, "a prompt must be a text or a list of token ids"),
        ([[1, 2]], {}, "a prompt must be a text or a list of token ids"),
        ("\ud800", {}, "a prompt holds half of a surrogate pair"),
    ],
    ids=lambda v: str(v)[:20].encode("ascii", "replace").decode(),
)
def test_prompts(engine, prompt, options, message):
    sampling = SamplingParams(**options)
    for call in (engine.add_request, engine.stream, lambda *args: engine.generate([[5], prompt], args[1])):
        with pytest.raises(DataError, match=message):
            call(prompt, sampling)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop=5), "stop=5 must be texts that are not empty"),
        (dict(stop=("a", "")), "stop=.* must be texts that are not empty"),
        (dict(stop_tokens=2.5), r"stop_tokens=2\.5 must be token ids"),
        (dict(stop_tokens=("a",)), "stop_tokens=.* must be token ids"),
        (dict(repetition_penalty=1e300), r"repetition_penalty=1e\+300 must be in \[0\.001, 1000\]"),
        (dict(repetition_penalty=0), r"repetition_penalty=0 must be in"),
    ],
)
def test_sampling_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


def test_one_stop_or_none():
    one = SamplingParams(stop="\n", stop_tokens=2)
    assert (one.stop, one.stop_tokens) == (("\n",), (2,))
    none = SamplingParams(stop=None, stop_tokens=None)
    assert (none.stop, none.stop_tokens) == ((), ())


def test_a_request_that_fits_into_no_pages(folder, monkeypatch):
    monkeypatch.setattr(parts, "Runner", FakeRunner)
    with Engine(folder, **SMALL | dict(kv_memory="8KiB")) as engine:
        with pytest.raises(DataError, match="a request of 17 tokens needs 5 pages; kv_memory='8KiB' holds 4"):
            engine.add_request([5] * 10, SamplingParams(max_new_tokens=7))
        assert len(engine.generate([[5] * 10], SamplingParams(max_new_tokens=6, ignore_eos=True))[0].tokens) == 6
    with Engine(folder, **SMALL | dict(router_memory="4KiB")) as engine:
        with pytest.raises(DataError, match="needs 5 pages; router_memory='4KiB' holds 4"):
            engine.add_request([5] * 10, SamplingParams(max_new_tokens=7))


def test_calls(engine):
    with pytest.raises(DataError, match="no prompt given"):
        engine.generate([])
    with pytest.raises(DataError, match="1 sampling options for 2 prompts"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(DataError, match="chat=True needs text prompts"):
        engine.add_request([1], chat=True)
    with pytest.raises(ConfigError, match="sampling must be SamplingParams, got dict"):
        engine.add_request([1], dict(seed=3))
    assert engine.cancel(12345) is False
    assert engine.generate(np.array([[1, 2]]), SamplingParams(max_new_tokens=1))[0].prompt == [1, 2]


def test_a_model_without_its_weights_is_checked_all_the_same(folder, tmp_path):
    whole, bare = api.load(folder), api.load(folder, weights=False)
    assert bare.config == whole.config and bare.expert_config == whole.expert_config
    assert np.array_equal(bare.experts, whole.experts) and bare.stop_tokens == whole.stop_tokens
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Engine(damaged)
