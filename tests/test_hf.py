"""Name tables and config.json against transformers: its own checkpoints in and out with equal bytes, its own defaults.

Checkpoints are made by transformers' *ForCausalLM at test time, every parameter random.
"""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CHECKPOINTS,
    SIZES,
    assert_trees_equal,
    checkpoint,
    config_of,
    raises,
    rewrite,
    tensors,
    write_folder,
    write_moe_folder,
)

from readme_jax import hf
from readme_jax.config import CheckpointError


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """A sharded folder written by us, for the tests that damage one; needs no torch."""
    folder = tmp_path_factory.mktemp("dense")
    write_folder(folder, hf.parse_config(SIZES | dict(model_type="llama"))[0], max_shard_bytes=20_000)
    return folder


@pytest.fixture
def damaged(dense, tmp_path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "model"))


# ---- round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip_is_byte_equal(name, tmp_path):
    folder, _ = checkpoint(name)
    cfg, experts, router = hf.read_config(folder)
    assert (folder / "model.safetensors.index.json").exists() == (CHECKPOINTS[name][3] == "20KB")
    params, table_LEC, router_params = hf.load_params(folder)
    assert experts is router is table_LEC is router_params is None
    with hf.Writer(tmp_path, max_shard_bytes=30_000) as writer:
        hf.save_params(writer, cfg, params)
    theirs, ours = tensors(folder), tensors(tmp_path)
    assert len(theirs) > 20 and set(theirs) == set(ours)
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype and value.shape == ours[key].shape
        assert value.tobytes() == ours[key].tobytes(), key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_orientation_and_transformers_opens_what_we_write(name, tmp_path):
    folder, model = checkpoint(name)
    import torch
    import transformers

    cfg, _, _ = hf.read_config(folder)
    params, _, _ = hf.load_params(folder, dtype=np.float32)

    def same(ours, theirs):
        np.testing.assert_array_equal(ours, theirs.detach().float().numpy())

    same(params["embedding"], model.model.embed_tokens.weight)
    same(params["norm"], model.model.norm.weight)
    assert ("head" in params) == (not cfg.tied)
    for i, layer in enumerate(model.model.layers):
        ours, attn, mlp = {k: v[i] for k, v in params["layers"].items()}, layer.self_attn, layer.mlp
        same(ours["attn_norm"], layer.input_layernorm.weight)
        same(ours["mlp_norm"], layer.post_attention_layernorm.weight)
        same(ours["w_q"], attn.q_proj.weight.reshape(4, 16, 32))
        same(ours["w_k"], attn.k_proj.weight.reshape(cfg.kv_head, 16, 32))
        same(ours["w_v"], attn.v_proj.weight.reshape(cfg.kv_head, 16, 32))
        same(ours["w_o"], attn.o_proj.weight.reshape(32, 4, 16))
        same(ours["w_gate"], mlp.gate_proj.weight)
        same(ours["w_up"], mlp.up_proj.weight)
        same(ours["w_down"], mlp.down_proj.weight.T)
        biases = {"b_q": attn.q_proj.bias, "b_k": attn.k_proj.bias, "b_v": attn.v_proj.bias, "b_o": attn.o_proj.bias}
        biases |= {"b_gate": mlp.gate_proj.bias, "b_up": mlp.up_proj.bias, "b_down": mlp.down_proj.bias}
        for key, bias in biases.items():
            assert (key in ours) == (bias is not None), key
            if bias is not None:
                same(ours[key].reshape(-1), bias)
        if cfg.qk_norm:
            same(ours["q_norm"], attn.q_norm.weight)
            same(ours["k_norm"], attn.k_norm.weight)

    # A model of ours, opened by transformers: every tensor known to it, none left at its own random value.
    mine = hf.init_params(cfg, seed=1)
    with hf.Writer(tmp_path, max_shard_bytes=30_000) as writer:
        hf.save_params(writer, cfg, mine)
    base = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf.config_to_hf(cfg, base, dtype="float32")))
    auto = transformers.AutoModelForCausalLM
    opened, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert next(opened.parameters()).dtype == torch.float32
    state = opened.state_dict()
    for key, value in tensors(tmp_path).items():
        np.testing.assert_array_equal(value, state[key].numpy())


def test_streaming_by_layer_equals_the_whole(dense, tmp_path):
    cfg, _, _ = hf.read_config(dense)
    reader = hf.Reader(dense)
    with hf.Writer(tmp_path, max_shard_bytes=20_000) as writer:
        hf.write_top(writer, cfg, hf.read_top(reader, cfg))
        for i, arrays in hf.iter_layers(reader, cfg):
            hf.write_layer(writer, cfg, i, arrays)
    ours, theirs = tensors(tmp_path), tensors(dense)
    assert set(ours) == set(theirs) and all(ours[k].tobytes() == theirs[k].tobytes() for k in ours)


def test_cast_on_load(dense):
    plain, _, _ = hf.load_params(dense)
    cast, _, _ = hf.load_params(dense, dtype=ml_dtypes.bfloat16)
    assert cast["layers"]["w_down"].dtype == ml_dtypes.bfloat16
    expected = plain["layers"]["w_down"].astype(ml_dtypes.bfloat16)
    assert cast["layers"]["w_down"].tobytes() == expected.tobytes()


def test_layers_of_different_dtype_need_a_cast(damaged):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(damaged, lambda found: found.update({name: found[name].astype(np.float16)}))
    with raises(CheckpointError, "up_proj.weight is float16", "is float32", "dtype"):
        hf.load_params(damaged)
    params, _, _ = hf.load_params(damaged, dtype=np.float32)
    assert params["layers"]["w_up"].dtype == np.float32


def test_memory_of_loading_and_writing(tmp_path):
    sizes = SIZES | dict(vocab_size=2000, hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    cfg, _, _ = hf.parse_config(sizes | dict(model_type="llama"))
    params = write_folder(tmp_path, cfg)
    total = sum(a.nbytes for a in (*params["layers"].values(), params["embedding"], params["head"], params["norm"]))
    largest = 2048 * 256 * 4
    assert total > 12 * largest
    del params
    tracemalloc.start()
    params, _, _ = hf.load_params(tmp_path)
    assert total <= tracemalloc.get_traced_memory()[1] < total + largest
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    with hf.Writer(tmp_path / "again", max_shard_bytes=3 * largest) as writer:
        hf.save_params(writer, cfg, params)
    assert tracemalloc.get_traced_memory()[1] - held < 2 * largest  # a transposed tensor, and small change
    del params
    tracemalloc.reset_peak()
    reader = hf.Reader(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    with hf.Writer(tmp_path / "streamed", max_shard_bytes=3 * largest) as writer:
        hf.write_top(writer, cfg, hf.read_top(reader, cfg))
        for i, arrays in hf.iter_layers(reader, cfg):
            hf.write_layer(writer, cfg, i, {name: np.array(array) for name, array in arrays.items()})
    # Copies, so that nothing is file-backed: one shard, the layer being made, a tensor.
    assert tracemalloc.get_traced_memory()[1] - held < 9 * largest < total
    tracemalloc.stop()
    assert len(list((tmp_path / "streamed").glob("model-*"))) > 4


# ---- carved folders ---------------------------------------------------------------------------


def test_carved_folder_round_trip(tmp_path):
    cfg, experts, router, params, experts_LEC, router_params = write_moe_folder(tmp_path)
    assert hf.read_config(tmp_path) == (cfg, experts, router)
    assert json.loads((tmp_path / "config.json").read_text())["keep"] == "me"
    back, back_LEC, back_router = hf.load_params(tmp_path)
    assert back_LEC.dtype == np.int32
    np.testing.assert_array_equal(back_LEC, experts_LEC)
    assert_trees_equal(back, params)
    assert_trees_equal(back_router, router_params)
    names = hf.Reader(tmp_path).names()
    for name in ("embedding.weight", "head.bias", "layers.1.in.weight", "layers.0.attn_norm.weight", "layers.1.o.bias"):
        assert f"readme.router.{name}" in names
    # The exported spelling of the same folder.
    config = json.loads((tmp_path / "config.json").read_text()) | dict(model_type="readme_qwen2")
    assert hf.parse_config(config) == (cfg, experts, router)
    # A router without the table that says what its answers mean is no folder.
    with raises(CheckpointError, "router", "experts"):
        hf.save_params(hf.Writer(tmp_path / "x"), cfg, params, None, router_params)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.__setitem__((0, 0, -1), 40), ["channel ids 0..40", "0..39"]),
        (lambda t: t.__setitem__((0, 0, 0), -1), ["channel ids -1.."]),
        (lambda t: t.__setitem__((1, 2, 1), t[1, 2, 0]), ["rise strictly"]),
    ],
)
def test_expert_table_out_of_range(change, words, tmp_path):
    write_moe_folder(tmp_path)

    def edit(found):
        table_LEC = np.tile(np.arange(16, dtype=np.int32), (3, 3, 1))
        change(table_LEC)
        found["readme.experts"] = table_LEC

    rewrite(tmp_path, edit)
    with raises(CheckpointError, "readme.experts", str(tmp_path), *words):
        hf.load_params(tmp_path)


def test_missing_router_tensor_and_table_dtype(tmp_path):
    write_moe_folder(tmp_path)
    rewrite(tmp_path, lambda found: found.pop("readme.router.head.bias"))
    with raises(CheckpointError, "readme.router.head.bias", "missing"):
        hf.load_params(tmp_path)
    shutil.rmtree(tmp_path)
    write_moe_folder(tmp_path)
    rewrite(tmp_path, lambda found: found.update({"readme.experts": found["readme.experts"].astype(np.int64)}))
    with raises(CheckpointError, "readme.experts", "int64", "int32"):
        hf.load_params(tmp_path)


# ---- checks of the tensors --------------------------------------------------------------------


LAYER1 = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: t.pop(LAYER1), [LAYER1, "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[LAYER1]}), ["model.layers.3.mlp.up_proj.weight"]),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}), ["q_proj.bias"]),
        (lambda t: t.update({LAYER1: t[LAYER1].T.copy()}), [LAYER1, "(32, 40)", "(40, 32)"]),
        (lambda t: t.update({LAYER1: t[LAYER1][:-1]}), [LAYER1, "(39, 32)", "(40, 32)"]),
        (lambda t: t.update({LAYER1: t[LAYER1].astype(np.float64)}), [LAYER1, "float64", "bfloat16"]),
    ],
)
def test_wrong_tensor_is_named(edit, words, damaged):
    rewrite(damaged, edit)
    cfg, _, _ = hf.read_config(damaged)
    with raises(CheckpointError, str(damaged), *words):
        hf.check(hf.Reader(damaged), cfg)
    with raises(CheckpointError, *words):
        hf.load_params(damaged)


def test_redundant_tensors_are_allowed_only_when_they_say_nothing_new(tmp_path):
    cfg, _, _ = hf.parse_config(config_of(tie_word_embeddings=True))
    params = write_folder(tmp_path, cfg)

    def add(found):
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        found["lm_head.weight"] = found["model.embed_tokens.weight"]

    rewrite(tmp_path, add)
    back, _, _ = hf.load_params(tmp_path)
    assert_trees_equal(back, params)
    rewrite(tmp_path, lambda found: found.update({"lm_head.weight": found["lm_head.weight"] + 1}))
    with raises(CheckpointError, "lm_head.weight", "tie_word_embeddings"):
        hf.load_params(tmp_path)


def test_parameters_that_do_not_fit_are_named(tmp_path):
    cfg, _, _ = hf.parse_config(config_of())
    for edit, words in (
        (lambda p: p["layers"].pop("w_up"), ["params.layers", "w_up", "missing"]),
        (lambda p: p["layers"].update(b_q=p["layers"]["w_q"]), ["b_q", "not part"]),
        (lambda p: p.pop("norm"), ["norm", "missing"]),
        (lambda p: p.update(norm=p["norm"][1:]), ["norm", "(31,)", "(32,)"]),
    ):
        params = hf.init_params(cfg)
        edit(params)
        with raises(CheckpointError, *words), hf.Writer(tmp_path) as writer:
            hf.save_params(writer, cfg, params)
        assert not list(tmp_path.iterdir())


def test_init_params_is_keyed_by_name():
    cfg, _, _ = hf.parse_config(config_of("qwen2"))
    params, again = hf.init_params(cfg, 5), hf.init_params(cfg, 5)
    assert_trees_equal(params, again)
    assert not np.array_equal(params["embedding"], hf.init_params(cfg, 6)["embedding"])
    assert not np.array_equal(params["layers"]["w_gate"], params["layers"]["w_up"])
    assert not np.array_equal(params["layers"]["w_gate"][0], params["layers"]["w_gate"][1])
    more = hf.init_params(dataclasses.replace(cfg, out_bias=True, qk_norm=True), 5)
    np.testing.assert_array_equal(params["layers"]["w_q"], more["layers"]["w_q"])
    assert 0.015 < params["layers"]["b_q"].std() < 0.025 and (params["norm"] == 1).all()


# ---- what lies beside the weights -------------------------------------------------------------


class FakeTokenizer:
    name_or_path = "some/tokenizer"

    def __init__(self, ids):
        self.vocab = {str(i): i for i in ids}

    def __len__(self):
        return len(self.vocab)

    def get_vocab(self):
        return self.vocab


def test_tokenizer_must_fit():
    cfg, _, _ = hf.parse_config(config_of())
    hf.check_tokenizer(FakeTokenizer(range(96)), cfg)
    hf.check_tokenizer(FakeTokenizer(range(50)), cfg)
    with raises(CheckpointError, "some/tokenizer", "97", "vocab_size=96"):
        hf.check_tokenizer(FakeTokenizer(range(97)), cfg)
    with raises(CheckpointError, "some/tokenizer", "101", "vocab_size=96"):
        hf.check_tokenizer(FakeTokenizer([*range(10), 100]), cfg)


def test_side_files_are_copied_and_nothing_else(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    side = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
    side += ["merges.txt", "generation_config.json", "chat_template.jinja", "added_tokens.json"]
    side += ["additional_chat_templates/tool.jinja"]
    for name in [*side, "config.json", "model.safetensors", "pytorch_model.bin", "run.py", "training_args.bin"]:
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_text(name)
    (src / "vocab.txt").symlink_to(src / "vocab.json")
    (src / "vocab.json").chmod(0o444)
    dst.mkdir()
    assert hf.copy_side_files(src, dst) == sorted([*side, "vocab.txt"])
    assert sorted(str(p.relative_to(dst)) for p in dst.rglob("*") if p.is_file()) == sorted([*side, "vocab.txt"])
    assert (dst / "vocab.txt").read_text() == "vocab.json" and not (dst / "vocab.txt").is_symlink()
    hf.copy_side_files(src, dst)  # again: what was read-only there is not here
