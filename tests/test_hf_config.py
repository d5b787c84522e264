"""config.json against transformers: its files, its defaults, both spellings of rope; every bad field is named."""

import dataclasses
import json

import pytest
from checkpoints import CHECKPOINTS, LLAMA3, NAMES, SIZES, checkpoint, config_of, moe_of, raises

from readme_jax import hf
from readme_jax.config import CheckpointError, ConfigError, RopeScaling


def test_separate_storage_fixes_the_width():
    base = SIZES | dict(model_type="llama")
    cfg, _, _ = hf.parse_config(base)
    experts, router = moe_of(cfg, "separate")
    with raises(ConfigError, "intermediate_size=40", "3 separate experts of 16"):
        hf.config_to_hf(cfg, base, experts, router)
    wide = dataclasses.replace(cfg, mlp=48)
    out = hf.config_to_hf(wide, base, experts, router)
    assert out["intermediate_size"] == 48 and hf.parse_config(out) == (wide, experts, router)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_agrees_with_transformers(name):
    folder, model = checkpoint(name)
    cfg, _, _ = hf.read_config(folder)
    theirs = model.config
    assert cfg.family == CHECKPOINTS[name][0]
    assert (cfg.vocab, cfg.embed, cfg.mlp, cfg.layer) == (96, 32, 40, 3)
    assert (cfg.head, cfg.kv_head, cfg.head_dim) == (4, theirs.num_key_value_heads, 16)
    assert (cfg.norm_eps, cfg.max_position, cfg.tied) == (1e-5, 128, theirs.tie_word_embeddings)
    assert cfg.rope_theta == theirs.rope_parameters["rope_theta"]
    kind = theirs.rope_parameters["rope_type"]
    assert (cfg.rope_scaling is None) == (kind == "default")
    attention = [layer.self_attn for layer in model.model.layers]
    window = theirs.sliding_window if cfg.family == "mistral" else None
    expected = tuple(window or getattr(a, "sliding_window", None) or 0 for a in attention)
    assert (cfg.windows or (0, 0, 0)) == expected
    assert cfg.qkv_bias == (attention[0].q_proj.bias is not None)
    assert cfg.out_bias == (attention[0].o_proj.bias is not None)
    # Through our own spelling and back, and in transformers' reading of it.
    written = hf.config_to_hf(cfg, {})
    assert hf.parse_config(written)[0] == cfg
    again = type(theirs)(**written)
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "layer_types", "hidden_act"):
        assert getattr(again, key, None) == getattr(theirs, key, None), key
    for key, value in theirs.rope_parameters.items():
        assert again.rope_parameters[key] == value


def test_known_values_of_windows_and_scaling():
    assert hf.read_config(checkpoint("qwen2_window")[0])[0].windows == (0, 16, 16)
    assert hf.read_config(checkpoint("qwen3_bias")[0])[0].windows == (24, 0, 24)
    assert hf.read_config(checkpoint("mistral")[0])[0].windows == (32, 32, 32)
    assert hf.read_config(checkpoint("mistral_full")[0])[0].windows == ()
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    )
    assert hf.read_config(checkpoint("llama3_rope")[0])[0].rope_scaling == scaling


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
        dict(rope_theta=5e5, rope_scaling={("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}),
        dict(rope_parameters=LLAMA3),
        dict(rope_theta=1e3, rope_parameters=LLAMA3),
        dict(rope_parameters=LLAMA3, original_max_position_embeddings=64),
        dict(rope_parameters={k: v for k, v in LLAMA3.items() if "original" not in k}, max_position_embeddings=64),
    ],
)
def test_spellings_of_llama3_scaling_are_one(changes):
    cfg, _, _ = hf.parse_config(config_of(**changes))
    assert cfg.rope_theta == 5e5
    assert cfg.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    )
    pytest.importorskip("torch")
    import transformers

    theirs = transformers.LlamaConfig(**config_of(**changes)).rope_parameters
    assert theirs["rope_theta"] == 5e5 and theirs["original_max_position_embeddings"] == 64


def test_family_defaults_are_those_of_transformers():
    import transformers

    for family, name in NAMES.items():
        bare = config_of(family, head_dim="absent")
        cfg, _, _ = hf.parse_config(bare)
        theirs = getattr(transformers, f"{name}Config")(**bare)
        assert cfg.head_dim == (getattr(theirs, "head_dim", None) or 8), family
        assert cfg.tied == theirs.tie_word_embeddings
        assert cfg.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0
        assert cfg.windows == ((4096,) * 3 if family == "mistral" else ())
    assert hf.parse_config(config_of(num_key_value_heads="absent"))[0].kv_head == 4
    # Linear scaling as Llama-2 derivatives spell it.
    cfg, _, _ = hf.parse_config(config_of(rope_scaling=dict(type="linear", factor=4)))
    assert cfg.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize("name", [key for key in SIZES if key != "head_dim"])
def test_missing_field_is_named(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3", **{name: "absent"})))
    with raises(ConfigError, str(tmp_path / "config.json"), f"{name}: missing"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="absent"), ["model_type", "missing"]),
        (dict(model_type="gpt_neox"), ["model_type='gpt_neox'", "llama, mistral, qwen2, qwen3"]),
        (dict(hidden_size="32"), ["hidden_size='32'", "whole number"]),
        (dict(hidden_size=True), ["hidden_size=True", "whole number"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers=0", "at least 1"]),
        (dict(intermediate_size=-4), ["intermediate_size=-4", "at least 1"]),
        (dict(rms_norm_eps=float("nan")), ["rms_norm_eps=nan"]),
        (dict(num_key_value_heads=3), ["num_attention_heads=4", "num_key_value_heads=3"]),
        (dict(head_dim="absent", hidden_size=34), ["hidden_size=34", "num_attention_heads=4"]),
        (dict(head_dim=7), ["head_dim=7", "even"]),
        (dict(hidden_act="gelu"), ["hidden_act='gelu'", "silu"]),
        (dict(quantization_config={"quant_method": "gptq"}), ["quantization_config"]),
        (dict(tie_word_embeddings="yes"), ["tie_word_embeddings='yes'", "true or false"]),
        (dict(rope_theta=0), ["rope_theta=0", "greater than 0"]),
        (dict(rope_scaling=dict(type="yarn", factor=4)), ["rope_scaling.rope_type='yarn'", "llama3"]),
        (dict(rope_scaling=dict(type="dynamic", factor=2)), ["rope_scaling.rope_type='dynamic'"]),
        (dict(rope_parameters=dict(rope_type="longrope")), ["rope_parameters.rope_type='longrope'"]),
        (dict(rope_scaling="linear"), ["rope_scaling='linear'", "mapping"]),
        (dict(rope_scaling=dict(type="linear")), ["rope_scaling.factor", "missing"]),
        (dict(rope_scaling=dict(type="linear", factor=0.5)), ["rope_scaling.factor=0.5"]),
        (dict(rope_parameters=LLAMA3 | dict(low_freq_factor=4)), ["rope_parameters.low_freq_factor=4"]),
        (
            dict(rope_parameters=LLAMA3, original_max_position_embeddings=9),
            ["rope_parameters.original_max_position_embeddings=64", "9"],
        ),
        (dict(rope_parameters={"full_attention": {}}), ["rope_parameters.full_attention"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
        (dict(model_type="mistral", sliding_window=0), ["sliding_window=0", "at least 1"]),
        (dict(model_type="mistral", layer_types=["full_attention"] * 3), ["layer_types", "sliding_window"]),
        (dict(model_type="qwen2", layer_types=["sliding_attention"] * 3), ["layer_types"]),
        (dict(model_type="qwen2", layer_types=["full_attention"]), ["layer_types", "num_hidden_layers=3"]),
        (dict(model_type="qwen3", layer_types=["linear_attention"] * 3), ["layer_types", "full_attention"]),
        (
            dict(
                model_type="qwen2",
                use_sliding_window=True,
                sliding_window=None,
                layer_types=["sliding_attention"] * 3,
            ),
            ["sliding_window is missing"],
        ),
        (dict(readme={}), ["readme", "experts"]),
        (dict(readme={"experts": {"experts": 2}}), ["readme.experts.channels", "missing"]),
    ],
)
def test_bad_config_is_named(changes, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    with raises(ConfigError, str(tmp_path / "config.json"), *words):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\ud800", '{"a": ' * 5000])
def test_config_file_that_is_no_json_object(text, tmp_path):
    with raises(CheckpointError, str(tmp_path / "config.json"), "no such file"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with raises(CheckpointError, str(tmp_path / "config.json"), "JSON"):
        hf.read_config(tmp_path)


def test_config_to_hf_refuses_a_foreign_base():
    cfg, _, _ = hf.parse_config(config_of())
    with raises(ConfigError, "kv_head=4", "2"):
        hf.config_to_hf(cfg, config_of(num_key_value_heads=4))
    kept = hf.config_to_hf(dataclasses.replace(cfg, mlp=24), config_of(torch_dtype="bfloat16", x=1), dtype="float32")
    assert kept == config_of(torch_dtype="float32", x=1, intermediate_size=24)
