"""The facade: NumPy in, NumPy out, whatever kind of folder was opened."""

import json
import subprocess
import sys

import numpy as np
import pytest
from stages import differing

import readme_jax
from readme_jax import api, export, hf
from readme_jax.config import CheckpointError, ConfigError, DataError, SourceError
from readme_jax.infer import generate
from readme_jax.train import import_hf

IDS = np.random.default_rng(1).integers(0, 384, (2, 40))


@pytest.fixture(scope="module")
def models(stages):
    return {name: readme_jax.load(getattr(stages, name)) for name in ("dense", "static", "tuned")}


def test_shapes_and_dtypes(models, stages):
    for name, model in models.items():
        for ids in (IDS, IDS.tolist(), IDS.astype(np.int8) & 127, IDS[:1, :1]):
            logits = model.logits(ids)
            assert type(logits) is np.ndarray and logits.dtype == np.float32
            assert logits.shape == (*np.shape(ids), 384) and np.isfinite(logits).all()
        route = model.route(IDS)
        if name == "dense":
            assert route is None and model.experts is None and model.expert_config is None
            continue
        assert type(route) is np.ndarray and route.dtype == np.int32 and route.shape == IDS.shape
        assert model.experts.dtype == np.int32 and model.experts.shape == (2, 3 if name == "tuned" else 1, 24)
    assert set(np.unique(models["tuned"].route(IDS))) <= {0, 1, 2} and not models["static"].route(IDS).any()
    assert models["tuned"].config == hf.read_config(stages.tuned)[0]
    assert models["tuned"].tokenizer("one two")["input_ids"]


def test_rows_and_later_tokens_change_nothing(models):
    for model in models.values():
        both = model.logits(IDS)
        np.testing.assert_allclose(model.logits(IDS[1:])[0], both[1], atol=1e-5)
        np.testing.assert_allclose(model.logits(IDS[:, :7]), both[:, :7], atol=1e-5)
        changed = IDS.copy()
        changed[:, 20:] = 0
        np.testing.assert_allclose(model.logits(changed)[:, :20], both[:, :20], atol=1e-5)
        # past the ladder's first rung of 64
        long = np.tile(IDS, (1, 4))
        np.testing.assert_allclose(model.logits(long)[:, :40], both, atol=1e-5)


def test_experts_are_masked_channels(models, stages):
    """With the channels of other experts zeroed by hand, the plain dense model gives the tuned model's logits."""
    tuned = models["tuned"]
    ids = IDS[:1, :1]  # one token, so one expert
    expert = int(tuned.route(ids)[0, 0])
    params, experts_LEC, _ = hf.load_params(stages.tuned, dtype=np.float32)
    for layer, channels_C in enumerate(experts_LEC[:, expert]):
        keep_F = np.zeros(48, bool)
        keep_F[channels_C] = True
        params["layers"]["w_down"][layer][~keep_F] = 0
    cfg = tuned.config
    import jax

    from readme_jax.models import backbone

    with jax.set_mesh(tuned._mesh):
        placed = backbone.place(cfg, params)
        x_BTD, _ = backbone.forward(cfg, placed, ids.astype(np.int32), np.ones((1, 1), np.int32))
        by_hand = np.asarray(backbone.unembed(placed, x_BTD))
    np.testing.assert_allclose(tuned.logits(ids), by_hand, atol=1e-5)
    assert np.abs(by_hand - models["dense"].logits(ids)).max() > 1e-3


def test_exported_folder_gives_the_same_bits(models, stages, tmp_path):
    exported = readme_jax.load(export.export(stages.tuned, tmp_path / "exported"))
    assert exported.config == models["tuned"].config and exported.router_config == models["tuned"].router_config
    np.testing.assert_array_equal(exported.logits(IDS), models["tuned"].logits(IDS))
    np.testing.assert_array_equal(exported.route(IDS), models["tuned"].route(IDS))
    np.testing.assert_array_equal(exported.experts, models["tuned"].experts)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 2], r"\[B, T\] and not empty, got \(2,\)"),
        (np.zeros((1, 0), int), r"not empty, got \(1, 0\)"),
        (np.zeros((1, 2)), "integers, got float64"),
        ([[1, 384]], "ids run from 1 to 384, the vocabulary has 384"),
        ([[-1, 3]], "ids run from -1 to 3"),
        (np.zeros((1, 513), int), "513 tokens exceed the context of 512"),
    ],
)
def test_bad_ids(models, ids, message):
    for call in (models["tuned"].logits, models["tuned"].route, models["dense"].route):
        with pytest.raises(DataError, match=message):
            call(ids)


def test_what_cannot_be_loaded(stages, tmp_path):
    with pytest.raises(ConfigError, match="3 experts but no router; train one with `readme-jax alternate`"):
        readme_jax.load(stages.carved)
    with pytest.raises(SourceError, match="no such folder"):
        readme_jax.load(tmp_path / "none")
    with pytest.raises(SourceError, match="needs config.json"):
        readme_jax.load(stages.text)
    with pytest.raises(SourceError, match="^a{80}...: File name too long$"):
        readme_jax.load("a" * 5000)
    with pytest.raises(SourceError, match="not a path"):
        readme_jax.load("a\0b")


def test_a_folder_without_tokenizer_still_computes(stages, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((stages.dense / name).read_bytes())
    model = api.load(str(tmp_path))
    assert model.logits(IDS).shape == (2, 40, 384)
    assert model.generate([[1, 2]], max_new_tokens=2, stop_tokens=[])[0].shape == (2,)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        model.generate("text")


def test_import_is_lazy():
    code = "import sys, readme_jax; assert 'load' in dir(readme_jax); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        readme_jax.loda  # noqa: B018
    assert readme_jax.Model is api.Model and readme_jax.Sampling is api.Sampling


def test_what_is_no_prompt(models):
    model = models["tuned"]
    for prompts in (
        *([1, 2, 3], [[1.5]], [["one"]], [None], [[[1]]], ["one", 2], ["one", [1, 2]], np.ones((1, 1, 1), int)),
        *({"one": 1}, None, 5, {"one"}, iter(["one"]), b"one", np.array(5)),
    ):
        with pytest.raises(DataError, match="prompts must be a text, a list of texts, or a list of lists"):
            model.generate(prompts, max_new_tokens=1)
    with pytest.raises(DataError, match="half of a surrogate pair at character 3"):
        model.generate(["one", "one\ud83d"], max_new_tokens=1)
    for stop in (0, [1.5], "0"):
        with pytest.raises(DataError, match="stop_tokens=.* must be a list of token ids"):
            model.generate("one", max_new_tokens=1, stop_tokens=stop)
    for run in (model.logits, model.route):
        with pytest.raises(DataError, match="rows of equal length"):
            run([[1, 2, 3], [4, 5]])


def test_an_exported_folder_comes_back_as_it_was(stages, tmp_path):
    exported = export.export(stages.tuned, tmp_path / "exported")
    import_hf.main(["--source", str(exported), "--out", str(tmp_path / "back")])
    assert differing(tmp_path / "back", stages.tuned) == set()
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", stages.tuned))
    assert config == was, "nothing of the export's own classes stays"


def test_generate_shows_the_experts_of_what_ran(stages, models, capsys):
    generate.main(["--model", str(stages.tuned), "--prompts", "one two three", "--max-new-tokens", "9", "--experts"])
    shown = capsys.readouterr().out.split("experts: ")[1].split()
    model = models["tuned"]
    ids = model.encode("one two three")
    ran = [*ids, *model.generate([ids], max_new_tokens=9)[0]]
    assert list(map(int, shown)) == model.route([ran])[0].tolist() and len(shown) == len(ran)
