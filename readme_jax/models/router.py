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
    apply_rope,
    attention,
    cache_mask,
    embed,
    linear,
    packed_mask,
    positions,
    rms_norm,
    rope_tables,
    write_cache,
)
from readme_jax.sharding import REPLICATED, gather, put, spec, stored

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
def abstract_params(cfg: RouterConfig, vocab: int, experts: int) -> Params:
    """Shapes of the router's parameter tree (float32)."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Router(cfg, vocab, experts))))


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


def param_specs(params: Params) -> Params:
    """PartitionSpec of every parameter at rest on the current mesh, for a tree of arrays or shapes."""

    def one(path, leaf):
        # a matrix is [out, width]; the bias of the head has one entry an expert
        width = None if path[-1].key == "b_head" else "router"
        lead = ("layer",) if path[0].key == "layers" else ()
        return stored((*lead, *(None,) * (leaf.ndim - len(lead) - 1), width), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, params)


def place(params: Params) -> Params:
    """Put host parameters on the current mesh by the sharding table."""
    return jax.tree.map(put, params, param_specs(params))


def _whole(w: jax.Array) -> jax.Array:
    return gather(w, jax.P(*(None,) * w.ndim), jnp.float32)


def trunk(cfg: RouterConfig, params: Params, ids_BT: jax.Array, positions_BT: jax.Array, theta: float, attend, carry):
    """The router with attention left to `attend(q, k, v, index, carry) -> (y_BTNH, carry)`; logits [B, T, E], carry."""
    head_dim = cfg.width // cfg.heads
    rope = rope_tables(positions_BT, head_dim, theta)

    def body(state, layer_inputs):
        x_BTR, carry = state
        index, layer = layer_inputs
        layer = {name: _whole(w) for name, w in layer.items()}

        def project(x_BTR, name):
            return linear(x_BTR, layer[f"w_{name}"], layer[f"b_{name}"])

        def heads(name):
            shape = (*ids_BT.shape, cfg.heads, head_dim)
            return jnp.reshape(project(y_BTR, name), shape, out_sharding=spec("batch", "seq", None, None))

        y_BTR = rms_norm(x_BTR, layer["attn_norm"], cfg.norm_eps)
        y_BTNH, carry = attend(apply_rope(heads("q"), rope), apply_rope(heads("k"), rope), heads("v"), index, carry)
        x_BTR += project(y_BTNH.reshape(*ids_BT.shape, cfg.width), "o")
        y_BTR = rms_norm(x_BTR, layer["mlp_norm"], cfg.norm_eps)
        return (x_BTR + project(jax.nn.silu(project(y_BTR, "in")), "out"), carry), None

    with jax.named_scope("router"):
        x_BTR = embed(params["embedding"], ids_BT, jnp.float32)
        (x_BTR, carry), _ = jax.lax.scan(body, (x_BTR, carry), (jnp.arange(cfg.layers), params["layers"]))
        x_BTR = rms_norm(x_BTR, params["norm"], cfg.norm_eps)
        return linear(x_BTR, _whole(params["head"]), params["b_head"]).astype(jnp.float32), carry


def logits(cfg: RouterConfig, params: Params, ids_BT: jax.Array, segments_BT: jax.Array, theta: float) -> jax.Array:
    """float32 router logits [B, T, E] of packed records; `theta` is the LLM's rotary base."""
    mask_BTT = packed_mask(segments_BT)

    def attend(q, k, v, index, carry):
        return attention(q, k, v, mask_BTT, ATTENTION_SCALE), carry

    return trunk(cfg, params, ids_BT, positions(segments_BT), theta, attend, ())[0]


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

    logits_BTE, cache = trunk(cfg, params, ids_BT, positions_BT, theta, attend, cache)
    return jnp.argmax(logits_BTE, -1).astype(jnp.int32), cache
