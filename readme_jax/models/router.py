"""The pre-gating router: a small causal transformer over token ids that names one expert for all layers (METHOD 3).

It never sees the backbone, so the expert of a token is known before the backbone runs. Two departures from the
reference: its decode cache is real, and padding is masked.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from readme_jax.config import RouterConfig
from readme_jax.models.layers import (
    ACTIVATION,
    apply_rope,
    attention,
    cache_mask,
    linear,
    packed_mask,
    positions,
    rms_norm,
    rope_tables,
    write_cache,
)
from readme_jax.sharding import REPLICATED, spec

Params = dict[str, Any]
ATTENTION_SCALE = 1.0  # the reference leaves out 1/sqrt(d)
MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_in", "w_out")
BIASES = ("b_q", "b_k", "b_v", "b_o", "b_in", "b_out")


class RouterBlock(nnx.Module):
    """All router blocks stacked on a leading axis: norm, attention with bias, norm, two-layer SiLU MLP with bias."""

    def __init__(self, cfg: RouterConfig):
        for name in MATRICES:
            setattr(self, name, nnx.Param(jnp.zeros((cfg.layers, cfg.width, cfg.width))))
        for name in (*BIASES, "attn_norm", "mlp_norm"):
            setattr(self, name, nnx.Param(jnp.zeros((cfg.layers, cfg.width))))


class Router(nnx.Module):
    """Token table, blocks, final norm and expert head: the declaration of the router's parameter tree."""

    def __init__(self, cfg: RouterConfig, vocab: int, experts: int):
        self.embedding = nnx.Param(jnp.zeros((vocab, cfg.width)))
        self.layers = RouterBlock(cfg)
        self.norm = nnx.Param(jnp.zeros((cfg.width,)))
        self.head = nnx.Param(jnp.zeros((experts, cfg.width)))
        self.b_head = nnx.Param(jnp.zeros((experts,)))


@functools.cache
def _declare(cfg: RouterConfig, vocab: int, experts: int) -> tuple[Any, Params]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Router(cfg, vocab, experts)))
    return graph, nnx.to_pure_dict(state)


def abstract_params(cfg: RouterConfig, vocab: int, experts: int) -> Params:
    """Shapes of the router's parameter tree (float32)."""
    return _declare(cfg, vocab, experts)[1]


def init_params(cfg: RouterConfig, embedding_VD: np.ndarray, experts: int, seed: int) -> Params:
    """Fresh router (NumPy, float32). The table starts as the first `width` columns of the LLM's embedding [paper's
    intent], repeated when the LLM is narrower; matrices normal(0, 1/sqrt(width)), head and biases zero, norms one."""
    rng = np.random.default_rng(seed)
    width = cfg.width
    repeats = -(-width // embedding_VD.shape[1])
    table_VR = np.tile(np.asarray(embedding_VD[:, :width], np.float32), (1, repeats))[:, :width]
    shape = (cfg.layers, width, width)
    layers = {name: rng.normal(0, width**-0.5, shape).astype(np.float32) for name in MATRICES}
    layers |= {name: np.zeros((cfg.layers, width), np.float32) for name in BIASES}
    layers |= {name: np.ones((cfg.layers, width), np.float32) for name in ("attn_norm", "mlp_norm")}
    return {
        "embedding": np.ascontiguousarray(table_VR),
        "layers": layers,
        "norm": np.ones(width, np.float32),
        "head": np.zeros((experts, width), np.float32),
        "b_head": np.zeros(experts, np.float32),
    }


def _config_of(params: Params) -> tuple[int, int]:
    return params["embedding"].shape[0], params["head"].shape[0]


def _run(cfg: RouterConfig, params: Params, ids_BT: jax.Array, positions_BT: jax.Array, theta: float, attend, carry):
    """The router with attention left to `attend(q, k, v, index, carry) -> (y_BTNH, carry)`; logits [B, T, E], carry."""
    model = nnx.merge(_declare(cfg, *_config_of(params))[0], params)
    head_dim = cfg.width // cfg.heads
    rope = rope_tables(positions_BT, head_dim, theta)

    def body(state, layer_inputs):
        x_BTR, carry = state
        index, layer = layer_inputs
        y_BTR = rms_norm(x_BTR, layer.attn_norm[...], cfg.norm_eps)

        def heads(w, b):
            shape = (*ids_BT.shape, cfg.heads, head_dim)
            return jnp.reshape(linear(y_BTR, w[...], b[...]), shape, out_sharding=spec("batch", "seq", None, None))

        q, k = apply_rope(heads(layer.w_q, layer.b_q), rope), apply_rope(heads(layer.w_k, layer.b_k), rope)
        y_BTNH, carry = attend(q, k, heads(layer.w_v, layer.b_v), index, carry)
        x_BTR += linear(y_BTNH.reshape(*ids_BT.shape, cfg.width), layer.w_o[...], layer.b_o[...])
        y_BTR = rms_norm(x_BTR, layer.mlp_norm[...], cfg.norm_eps)
        y_BTR = jax.nn.silu(linear(y_BTR, layer.w_in[...], layer.b_in[...]))
        return (x_BTR + linear(y_BTR, layer.w_out[...], layer.b_out[...]), carry), None

    with jax.named_scope("router"):
        x_BTR = model.embedding[...].at[ids_BT].get(out_sharding=ACTIVATION)
        (x_BTR, carry), _ = jax.lax.scan(body, (x_BTR, carry), (jnp.arange(cfg.layers), model.layers))
        x_BTR = rms_norm(x_BTR, model.norm[...], cfg.norm_eps)
        return linear(x_BTR, model.head[...], model.b_head[...]).astype(jnp.float32), carry


def logits(cfg: RouterConfig, params: Params, ids_BT: jax.Array, segments_BT: jax.Array, theta: float) -> jax.Array:
    """float32 router logits [B, T, E] of packed records; `theta` is the LLM's rotary base."""
    mask_BTT = packed_mask(segments_BT)

    def attend(q, k, v, index, carry):
        return attention(q, k, v, mask_BTT, ATTENTION_SCALE), carry

    return _run(cfg, params, ids_BT, positions(segments_BT), theta, attend, ())[0]


def route(cfg: RouterConfig, params: Params, ids_BT: jax.Array, segments_BT: jax.Array, theta: float) -> jax.Array:
    """int32 [B, T] expert of each token: argmax of the logits, the lower id on a tie."""
    return jnp.argmax(logits(cfg, params, ids_BT, segments_BT, theta), -1).astype(jnp.int32)


def init_cache(cfg: RouterConfig, batch: int, slots: int, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Empty key/value cache of the router [layers, B, S, heads, width/heads]."""
    shape = (cfg.layers, batch, slots, cfg.heads, cfg.width // cfg.heads)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def step(
    cfg: RouterConfig,
    params: Params,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    cache: dict[str, jax.Array],
    theta: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Prefill or decode through the cache (see `backbone.step`): int32 experts [B, T] and the new cache."""
    mask_BTS = cache_mask(positions_BT, cache["k"].shape[2])

    def attend(q, k, v, index, carry):
        k_all = write_cache(carry["k"], index, positions_BT, k)
        v_all = write_cache(carry["v"], index, positions_BT, v)
        q = jax.reshard(q, REPLICATED)  # as the cache
        return attention(q, k_all[index], v_all[index], mask_BTS, ATTENTION_SCALE), {"k": k_all, "v": v_all}

    logits_BTE, cache = _run(cfg, params, ids_BT, positions_BT, theta, attend, cache)
    return jnp.argmax(logits_BTE, -1).astype(jnp.int32), cache
