"""The backbone against Hugging Face in PyTorch for every family; packing, padding, and decoding through the cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_core import packed, random_params, random_table

from readme_jax import hf
from readme_jax.config import ModelConfig
from readme_jax.models import backbone, layers
from readme_jax.models.experts import Masked, make_table
from readme_jax.steps import plan

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=3.0)
SLIDING = dict(use_sliding_window=True, sliding_window=12, max_window_layers=1)

# name -> transformers' class prefix, config fields. 96 tokens: beyond every window and the original llama3 length.
CHECKPOINTS = {
    "llama2": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "linear rope": ("Llama", dict(rope_parameters=LINEAR, num_key_value_heads=1)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5))),
    "llama with biases": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=20, head_dim=16)),
    "mistral, full": ("Mistral", dict(sliding_window=None, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, window in the second layer": ("Qwen2", SLIDING | dict(num_key_value_heads=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, biases and window": ("Qwen3", SLIDING | dict(head_dim=16, attention_bias=True, num_key_value_heads=4)),
}


def torch_model(name):
    """A random float32 transformers model. Its init leaves biases at 0 and norms at 1; here every tensor is random."""
    torch = pytest.importorskip("torch")
    import transformers

    prefix, fields = CHECKPOINTS[name]
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | fields))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    random = torch.Generator().manual_seed(sorted(CHECKPOINTS).index(name))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key:
                value.normal_(1.0, 0.3, generator=random)
            else:
                fan = 1 if "embed" in key or key.endswith("bias") else value.shape[-1]
                value.normal_(0.0, 1.0 / math.sqrt(fan), generator=random)
    return torch, model


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_match_pytorch(mesh, tmp_path, name):
    torch, model = torch_model(name)
    model.save_pretrained(tmp_path)
    cfg, _, _ = hf.read_config(tmp_path)
    params = backbone.place(cfg, hf.load_params(tmp_path)[0])
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (2, 96)).astype(np.int32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids).long()).logits.numpy()
    assert expected.std() > 0.5, "logits of this size make 1e-4 a tight bound"

    @jax.jit
    def logits(params, ids, segments):
        return backbone.unembed(params, backbone.forward(cfg, params, ids, segments)[0])

    got = logits(params, ids, np.ones_like(ids))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# ---- one config with everything in it ---------------------------------------------------------------

CFG = ModelConfig(
    family="qwen3", vocab=64, embed=32, mlp=48, layer=2, head=4, kv_head=2, head_dim=16, norm_eps=1e-5,
    rope_theta=10000.0, max_position=256, tied=False, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
    windows=(12, 0),
)  # fmt: skip
E, LENGTH = 4, 200


@jax.jit
def full(params, table, ids, segments, route):
    return backbone.forward(CFG, params, ids, segments, table=table, route=route)[0]


@jax.jit
def step(params, table, ids, positions, cache, route):
    x_BTD, cache = backbone.step(CFG, params, ids, positions, cache, table=table, route=route)
    return backbone.unembed(params, x_BTD), cache


@jax.jit
def unembed(params, x_BTD):
    return backbone.unembed(params, x_BTD)


@pytest.fixture
def model(mesh):
    """(params, table, ids [2, 200], experts [2, 200], logits of the full forward)."""
    params = backbone.place(CFG, random_params(backbone.abstract_params(CFG), seed=5))
    table = make_table(random_table(CFG.layer, E, 24, CFG.mlp), CFG.mlp)
    ids, segments = packed([[LENGTH], [LENGTH]], LENGTH, CFG.vocab, seed=6)
    expert = np.random.default_rng(7).integers(0, E, ids.shape).astype(np.int32)
    logits = np.asarray(unembed(params, full(params, table, ids, segments, Masked(expert))))
    return params, table, ids, expert, logits


def test_decoding_one_token_at_a_time_is_the_full_forward(model):
    params, table, ids, expert, logits = model
    cache = backbone.init_cache(CFG, 2, LENGTH)
    for t in range(LENGTH):
        now, at = slice(t, t + 1), np.full((2, 1), t, np.int32)
        got, cache = step(params, table, ids[:, now], at, cache, Masked(expert[:, now]))
        np.testing.assert_allclose(got, logits[:, now], rtol=1e-4, atol=1e-4, err_msg=f"token {t}")


@pytest.mark.parametrize("way", ["masked", "grouped"])
def test_prefill_of_padded_rows_then_decode(model, way):
    """Prompts of 30 and 50 tokens padded on the right to 50, then 20 more tokens each, in a cache of 200 slots."""
    params, table, ids, expert, logits = model
    lengths = np.array([30, 50])
    prompt, routed = ids[:, :50].copy(), expert[:, :50].copy()
    prompt[0, 30:], routed[0, 30:] = 7, 0
    route = jax.tree.map(lambda a: a[0], plan(routed[None], E, way))
    places = np.tile(np.arange(50, dtype=np.int32), (2, 1))
    got, cache = step(params, table, prompt, places, backbone.init_cache(CFG, 2, LENGTH), route)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], logits[row, :length], rtol=1e-4, atol=1e-4)
    for i in range(20):
        at = (lengths + i)[:, None].astype(np.int32)
        now = Masked(np.take_along_axis(expert, at, 1))
        got, cache = step(params, table, np.take_along_axis(ids, at, 1), at, cache, now)
        expected = np.take_along_axis(logits, at[..., None], 1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=f"{i} tokens after the prompt")


def test_documents_of_a_record_do_not_see_each_other(mesh):
    """A packed record, and each of its documents alone at the start of a padded record, give the same states."""
    lengths = [20, 30, 31]
    params = backbone.place(CFG, random_params(backbone.abstract_params(CFG), seed=5))
    ids, segments = packed([lengths, [20], [30], [31]], 96, CFG.vocab)
    starts = np.cumsum([0, *lengths])
    for i, length in enumerate(lengths):
        ids[1 + i, :length] = ids[0, starts[i] : starts[i] + length]
    ids[1:, 40:] = 3  # what padding holds must not matter
    x = np.asarray(full(params, None, ids, segments, None))
    assert np.isfinite(x).all(), "padding gives numbers, not NaN"
    for i, length in enumerate(lengths):
        alone = x[1 + i, :length]
        np.testing.assert_allclose(x[0, starts[i] : starts[i] + length], alone, rtol=1e-5, atol=1e-5)
    short = full(params, None, ids[:, :40], segments[:, :40], None)
    np.testing.assert_allclose(short, x[:, :40], rtol=1e-5, atol=1e-5, err_msg="the length of a record changed it")


def test_positions_restart_with_each_document():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 4, 3, 0]], np.int32)
    np.testing.assert_array_equal(jax.jit(layers.positions)(segments), [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 0]])


def test_parameter_count_of_llama_2_7b():
    cfg = dataclasses.replace(
        CFG, family="llama", vocab=32000, embed=4096, mlp=11008, layer=32, head=32, kv_head=32, head_dim=128,
        qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False, windows=(),
    )  # fmt: skip
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(backbone.abstract_params(cfg))) == 6_738_415_616
