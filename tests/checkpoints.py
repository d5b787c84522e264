"""Checkpoints for the tests of Hugging Face folders: transformers' own and ours, and how to damage one."""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from readme_jax import hf
from readme_jax.config import ExpertConfig, ReadMeError, RouterConfig

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# name -> family, config fields, dtype, shard size
CHECKPOINTS = {
    "llama": ("llama", {}, "float32", "1GB"),
    "llama_tied": ("llama", dict(tie_word_embeddings=True, num_key_value_heads=1), "bfloat16", "20KB"),
    "llama3_rope": ("llama", dict(rope_parameters=LLAMA3, num_key_value_heads=4), "float16", "20KB"),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True), "bfloat16", "1GB"),
    "mistral": ("mistral", dict(sliding_window=32), "bfloat16", "20KB"),
    "mistral_full": ("mistral", dict(sliding_window=None, tie_word_embeddings=True), "float32", "20KB"),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True), "float16", "1GB"),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), "float32", "20KB"),
    "qwen3": ("qwen3", {}, "bfloat16", "20KB"),
    "qwen3_bias": (
        "qwen3",
        dict(
            attention_bias=True,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=2.0),
        ),
        "float32",
        "1GB",
    ),
}


def make_model(name: str):
    """A random transformers model of CHECKPOINTS: biases and norms random too, or an exchange of two would not show."""
    torch = pytest.importorskip("torch")
    import transformers

    family, fields, dtype, _ = CHECKPOINTS[name]
    config = getattr(transformers, f"{NAMES[family]}Config")(**(SIZES | fields))
    generator = torch.Generator().manual_seed(sorted(CHECKPOINTS).index(name))
    model = getattr(transformers, f"{NAMES[family]}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(getattr(torch, dtype))


_KEEP = []  # temporary folders live as long as the process


@functools.cache
def checkpoint(name: str):
    """(folder, torch model) of CHECKPOINTS, made once a session. Skips where torch is not installed."""
    model = make_model(name)
    _KEEP.append(tempfile.TemporaryDirectory())
    folder = Path(_KEEP[-1].name)
    model.save_pretrained(folder, max_shard_size=CHECKPOINTS[name][3])
    return folder, model


def write_folder(folder: Path, cfg, max_shard_bytes: int = 1 << 30) -> hf.Params:
    params = hf.init_params(cfg, seed=3)
    with hf.Writer(folder, max_shard_bytes) as writer:
        hf.save_params(writer, cfg, params)
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(cfg, {})))
    return params


@contextlib.contextmanager
def raises(error: type[ReadMeError], *words: str):
    """As pytest.raises; the message is one line and holds every word."""
    with pytest.raises(error) as info:
        yield
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads: the independent view of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rewrite(folder: Path, edit) -> None:
    """Change the tensors of a folder with the safetensors library, into one file."""
    found = tensors(folder)
    edit(found)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def config_of(family: str = "llama", **changes) -> dict:
    merged = SIZES | dict(model_type=family) | changes
    return {key: value for key, value in merged.items() if value != "absent"}


def assert_trees_equal(a, b):
    assert set(a) == set(b)
    for key in a:
        if isinstance(a[key], dict):
            assert_trees_equal(a[key], b[key])
        else:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def moe_of(cfg, storage="tied"):
    experts = ExpertConfig(
        experts=3, channels=16, storage=storage, names=("a", "b", "c"), importance="energy", carving="domain"
    )
    return experts, RouterConfig(width=16, heads=2, layers=2)


def write_moe_folder(folder: Path):
    cfg, _, _ = hf.parse_config(SIZES | dict(model_type="qwen2"))
    experts, router = moe_of(cfg)
    rng = np.random.default_rng(0)
    picks = [[rng.permutation(cfg.mlp)[:16] for _ in range(3)] for _ in range(cfg.layer)]
    experts_LEC = np.sort(np.array(picks), axis=-1)
    R = router.width

    def block(*shape):
        return rng.standard_normal(shape, np.float32)

    layers = {f"w_{n}": block(2, R, R) for n in ("q", "k", "v", "o", "in", "out")}
    layers |= {f"b_{n}": block(2, R) for n in ("q", "k", "v", "o", "in", "out")}
    layers |= {"attn_norm": block(2, R), "mlp_norm": block(2, R)}
    router_params = {"embedding": block(96, R), "norm": block(R), "head": block(3, R), "b_head": block(3)}
    router_params["layers"] = layers
    params = hf.init_params(cfg, dtype=ml_dtypes.bfloat16)
    with hf.Writer(folder, 20_000) as writer:
        hf.save_params(writer, cfg, params, experts_LEC, router_params)
    config = hf.config_to_hf(cfg, SIZES | dict(model_type="qwen2", keep="me"), experts, router)
    (folder / "config.json").write_text(json.dumps(config))
    return cfg, experts, router, params, experts_LEC, router_params
