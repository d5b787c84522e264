"""The exported PyTorch model against transformers' own dense model with hooks and the NumPy router of oracles.py."""

import contextlib
import inspect
import json
import shutil

import numpy as np
import pytest
import yaml
from oracles import router_logits
from safetensors.numpy import load_file, save_file
from torch_folders import EPS, FAMILIES, HEADS, THETA, E, L, V, dense_logits, load_ours, make_folder, token_ids

from readme_jax import artifacts, hf
from readme_jax.config import ArtifactError, CheckpointError, ConfigError, ExpertConfig, ReadMeError
from readme_jax.export import check_export, export

# The same question as modeling_readme.py asks: transformers renamed the argument in 5.24.
CACHE = "past_key_values"
with contextlib.suppress(ImportError):
    from transformers import LlamaForCausalLM

    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters:
        CACHE = "cache"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices run faster on one thread, several times so when other tests share the cores."""
    torch = pytest.importorskip("torch", reason="the `torch` extra is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One exported llama folder and its input."""
    root = tmp_path_factory.mktemp("export")
    source = root / "source.v1"
    source.mkdir()
    table, router = make_folder(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": True, "top_k": 5}))
    (source / "tokenizer.json").write_text("{}")
    figures = {"Held-out loss": {"dense": 2.5, "routed": 2.75}, "Perplexity": {"dense": {"wiki": 9.0, "code": 3}}}
    card = {"name": "tiny", "base_model": "someone/tiny", "license": "apache-2.0", "figures": figures}
    return export(source, root / "out.v1", card=card), source, table, router


@pytest.mark.parametrize("storage", ["tied", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_dense_model_with_oracle_experts(tmp_path, family, storage):
    import torch

    (tmp_path / "in").mkdir()
    table, router = make_folder(tmp_path / "in", family, storage=storage)
    out = export(tmp_path / "in", tmp_path / "out")
    ids = token_ids()
    expert_BT = router_logits(router, ids.numpy(), HEADS, THETA, EPS).argmax(-1)
    assert len(np.unique(expert_BT)) == E, "the test needs every expert in use"
    model = load_ours(out)
    with torch.no_grad():
        got = model(ids)
    np.testing.assert_array_equal(got.expert_ids.numpy(), expert_BT)
    assert got.expert_ids.dtype == torch.int32
    np.testing.assert_array_equal(model.route(ids).numpy(), expert_BT)
    want = dense_logits(out, family, ids, table, expert_BT)
    np.testing.assert_allclose(got.logits.numpy(), want, atol=1e-4)
    # The mask does something: the plain model's logits are far away.
    assert np.abs(dense_logits(out, family, ids) - want).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_full_forward(tmp_path, family):
    """One token at a time, past Mistral's window; padded rows, beams and no cache give what single rows give."""
    import torch

    (tmp_path / "in").mkdir()
    make_folder(tmp_path / "in", family)
    model = load_ours(export(tmp_path / "in", tmp_path / "out"))
    ids = token_ids()
    with torch.no_grad():
        full, cache, logits, experts = model(ids), None, [], []
        for t in range(ids.shape[1]):
            step = model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True)
            cache = step[CACHE]
            logits.append(step.logits)
            experts.append(step.expert_ids)
        assert torch.equal(torch.cat(experts, 1), full.expert_ids)
        assert (torch.cat(logits, 1) - full.logits).abs().max() < 1e-4
        # Cropping removes the router's tokens too: decoding again from the middle gives the same.
        if family != "mistral":
            cache.crop(-10)
            again = model(ids[:, -10:], **{CACHE: cache}, use_cache=True)
            assert (again.logits - full.logits[:, -10:]).abs().max() < 1e-4
    pad = 9
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.int64), ids[:1, : 70 - pad]], 1)
    batch = torch.cat([padded, ids[1:]])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    assert torch.equal(model.route(batch, mask)[0, pad:], full.expert_ids[0, : 70 - pad])
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    made = model.generate(batch, attention_mask=mask, **greedy)
    single = [model.generate(ids[:1, : 70 - pad], **greedy)[:, -8:], model.generate(ids[1:], **greedy)[:, -8:]]
    assert torch.equal(made[:, -8:], torch.cat(single))
    assert torch.equal(model.generate(batch, attention_mask=mask, use_cache=False, **greedy), made)
    beams = [
        model.generate(batch, attention_mask=mask, num_beams=3, use_cache=cached, **greedy) for cached in (True, False)
    ]
    assert torch.equal(*beams)


def test_packed_positions_do_not_see_each_other(exported):
    """Positions that start again, without a cache: the second sequence is routed as if it stood alone."""
    import torch

    model = load_ours(exported[0])
    ids = token_ids(3, 1, 40)
    position_ids = torch.cat([torch.arange(15), torch.arange(25)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=position_ids, use_cache=False)
        alone = model(ids[:, 15:], use_cache=False)
    assert torch.equal(packed.expert_ids[:, 15:], alone.expert_ids)
    assert (packed.logits[:, 15:] - alone.logits).abs().max() < 1e-4


def test_given_experts_override_the_router(exported):
    import torch

    folder, _, table, _ = exported
    model, ids = load_ours(folder), token_ids(4)
    expert_BT = np.random.default_rng(5).integers(0, E, ids.shape)
    with torch.no_grad():
        got = model(ids, expert_ids=torch.from_numpy(expert_BT))
        np.testing.assert_allclose(got.logits.numpy(), dense_logits(folder, "llama", ids, table, expert_BT), atol=1e-4)
        # The router has kept up in the cache: the next token is routed as without the override.
        last = model(ids[:, :1], **{CACHE: got[CACHE]}).expert_ids
        assert torch.equal(last, model.route(torch.cat([ids, ids[:, :1]], 1))[:, -1:])
        one = model(ids, expert_ids=torch.tensor(2))
        assert bool((one.expert_ids == 2).all()) and one.expert_ids.shape == ids.shape
        embeds = model(inputs_embeds=model.model.embed_tokens(ids), expert_ids=torch.tensor(2), use_cache=False)
    assert (embeds.logits - one.logits).abs().max() < 1e-5
    with pytest.raises(ValueError, match="integers"):
        model(ids, expert_ids=torch.zeros(ids.shape))


def test_static_mask_without_router(tmp_path):
    """One expert, no router: every token is in expert 0."""
    import torch

    (tmp_path / "in").mkdir()
    table, _ = make_folder(tmp_path / "in", experts=1, routed=False)
    model = load_ours(export(tmp_path / "in", tmp_path / "out"))
    ids = token_ids()
    with torch.no_grad():
        got = model(ids)
        embedded = model(inputs_embeds=model.model.embed_tokens(ids))
    assert not got.expert_ids.any()
    want = dense_logits(tmp_path / "out", "llama", ids, table, np.zeros(ids.shape, int))
    np.testing.assert_allclose(got.logits.numpy(), want, atol=1e-4)
    np.testing.assert_allclose(embedded.logits.numpy(), want, atol=1e-4)


def test_experts_without_router_need_ids(tmp_path):
    import torch

    (tmp_path / "in").mkdir()
    make_folder(tmp_path / "in", routed=False)
    model = load_ours(export(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(ValueError, match="3 experts and no router: pass expert_ids"):
        model(token_ids())
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made = [model.generate(token_ids(), expert_ids=torch.tensor([[e]]), **greedy) for e in range(E)]
    assert not torch.equal(made[0], made[1]) or not torch.equal(made[0], made[2])


def test_more_tokens(exported, tmp_path):
    """Tokens added to the vocabulary get a row in the router's table too, and the folder they are saved to opens."""
    import torch

    model = load_ours(exported[0])
    ids = torch.as_tensor(token_ids())
    before = model(ids)
    model.resize_token_embeddings(V + 3)
    after = model(ids)
    torch.testing.assert_close(before.logits, after.logits[..., :V], atol=1e-5, rtol=0)
    assert torch.equal(before.expert_ids, after.expert_ids)
    assert model.route(torch.tensor([[3, V + 2]])).shape == (1, 2)
    model.save_pretrained(tmp_path / "more")
    again = load_ours(tmp_path / "more")
    new = torch.tensor([[3, V + 2]])
    assert torch.equal(again(new).logits, model(new).logits)
    model.resize_token_embeddings(V)
    torch.testing.assert_close(model(ids).logits, before.logits, atol=1e-5, rtol=0)


def test_refused_calls(exported):
    import torch

    model, ids = load_ours(exported[0]), token_ids()
    with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(RuntimeError, match="not its `.model`"):
        model.model(ids)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 70\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    foreign = model(ids)[CACHE]
    foreign.layers = foreign.layers[:L]
    with pytest.raises(ValueError, match="70 tokens of the backbone but 0 of the router"):
        model(ids[:, :1], **{CACHE: foreign})


def test_half_precision_keeps_the_routing(exported):
    """The router stays in float32 when the backbone is loaded in bfloat16: same experts, logits near."""
    import torch

    ids = token_ids(6)
    with torch.no_grad():
        full, half = (load_ours(exported[0], dtype=dtype)(ids) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(full.expert_ids, half.expert_ids)
    router = load_ours(exported[0], dtype=torch.bfloat16).readme.router
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    assert half.logits.dtype == torch.bfloat16
    assert (full.logits - half.logits.float()).abs().mean() < 0.05 * full.logits.abs().mean()


def test_tensors_are_byte_equal_and_import_back(exported):
    folder, source, table, router = exported
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and before[k].tobytes() == after[k].tobytes() for k in before)
    assert hf.read_config(folder) == hf.read_config(source)
    params, experts_LEC, router_back = hf.load_params(folder)
    np.testing.assert_array_equal(experts_LEC, table)
    np.testing.assert_array_equal(params["embedding"], before["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["layers"]["w_down"][1], before["model.layers.1.mlp.down_proj.weight"].T)
    assert router_back is not None and router is not None
    for name in ("embedding", "norm", "head", "b_head"):
        np.testing.assert_array_equal(router_back[name], router[name])
    assert router_back["layers"].keys() == router["layers"].keys()
    for name, array in router["layers"].items():
        np.testing.assert_array_equal(router_back["layers"][name], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_own_parameters_survive_the_round_trip(tmp_path, tiny_cfg, dtype):
    """hf.save_params -> export -> hf.load_params is bit-equal, in bfloat16 and over several shards too."""
    import ml_dtypes

    kind = np.dtype(dtype) if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)
    params = hf.init_params(tiny_cfg, seed=3, dtype=kind)
    channels = tiny_cfg.mlp // 2
    experts = ExpertConfig(
        experts=2, channels=channels, storage="tied", names=("a", "b"), importance="energy", carving="domain"
    )
    rng = np.random.default_rng(0)
    table = np.array([[np.sort(rng.permutation(tiny_cfg.mlp)[:channels]) for _ in "ab"] for _ in range(2)], np.int32)
    source = tmp_path / "in"
    source.mkdir()
    writer = hf.Writer(source, max_shard_bytes=10_000)
    hf.save_params(writer, tiny_cfg, params, table)
    writer.close()
    data = hf.config_to_hf(tiny_cfg, {}, experts)
    (source / "config.json").write_text(json.dumps(data))
    assert len(list(source.glob("*.safetensors"))) > 1
    out = export(source, tmp_path / "out")
    back, table_back, router = hf.load_params(out)
    assert hf.read_config(out) == (tiny_cfg, experts, None) and router is None
    np.testing.assert_array_equal(table_back, table)
    assert back.keys() == params.keys() and back["layers"].keys() == params["layers"].keys()
    for mine, theirs in [*zip_named(params, back), *zip_named(params["layers"], back["layers"])]:
        assert mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()


def zip_named(one, other):
    return [(one[name], other[name]) for name in one if name != "layers"]


def test_folder_and_card(exported):
    folder, source, _, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("readme_llama", "llama")
    assert config["readme"] == json.loads((source / "config.json").read_text())["readme"]
    assert (folder / "tokenizer.json").is_file() and (folder / "generation_config.json").is_file()
    assert artifacts.verify(folder, hashes=True)["stage"] == "export"
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["base_model"], front["license"], front["library_name"]) == (
        "someone/tiny", "apache-2.0", "transformers",
    )  # fmt: skip
    assert "| routed | 2.75 |" in text and "| dense | 9 | 3 |" in text and "trust_remote_code=True" in text
    # Finished and unchanged: not made again. Another card: another result, refused.
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    with pytest.raises(ArtifactError, match="belongs to another run"):
        export(source, folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_check_export(exported):
    """As a user opens it, in a fresh process: AutoModel with remote code, greedy tokens, the plain family."""
    import torch

    folder, _, _, router = exported
    model, ids = load_ours(folder), token_ids(7, 2, 64)
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    prompt = [5, 6, 7]
    sequence = list(prompt)
    for _ in range(12):  # greedy without generate: the whole sequence through the model every time
        with torch.no_grad():
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    expert_BT = router_logits(router, ids.numpy(), HEADS, THETA, EPS).argmax(-1)
    dense = dense_logits(folder, "llama", ids)
    given = {"prompts": [prompt], "continuations": [sequence[3:]], "dense_logits_BTV": dense}
    figures = check_export(folder, ids.numpy(), expert_BT, logits, **given)
    assert figures["tokens"] == 128 and figures["expert_mismatches"] == 0 and figures["greedy_tokens"] == 12
    assert figures["logits_max_abs"] < 1e-4 and figures["plain_max_abs"] < 1e-4 and figures["plain_opens"]
    # One answer of each kind is changed: the error names them all.
    expert_BT[0, 3] = (expert_BT[0, 3] + 1) % E
    logits[1, 5, 7] += 0.5
    dense[0, 0, 0] = np.nan
    given["continuations"] = [sequence[3:-1] + [(sequence[-1] + 1) % V]]
    with pytest.raises(ArtifactError) as failed:
        check_export(folder, ids.numpy(), expert_BT, logits, **given)
    for problem in (
        "1 of 128 tokens take another expert", "; logits differ by 0.5, at most 0.001", "dense logits differ by inf",
        "1 of 12 greedy tokens differ",
    ):  # fmt: skip
        assert problem in str(failed.value)


def test_check_export_of_a_folder_without_its_code(exported, tmp_path):
    folder = exported[0]
    ids = np.ones((1, 4), np.int32)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "modeling_readme.py").unlink()
    with pytest.raises(ArtifactError, match="cannot be opened and run in PyTorch"):
        check_export(broken, ids, ids, np.zeros((1, 4, V)))


def test_refused_exports(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    make_folder(source)
    for card, message in (
        ({"licence": "mit"}, "card.licence: no such key"),
        ({"license": 3}, "card.license: 3 has the wrong type"),
        ({"figures": {"Loss": {}}}, "card.figures.Loss: a mapping of rows"),
        ({"figures": {"Loss": {"a": 1, "b": {"c": 2}}}}, "rows are all values"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(source, tmp_path / "out", card=card)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        export(source, tmp_path / "out")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["readme.router.head.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="readme.router.head.bias"):
        export(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    del config["readme"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReadMeError, match="readme"):
        export(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
