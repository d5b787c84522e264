"""Llama-family decoder as stacked NNX modules run under `lax.scan`: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen3.

NNX declares the parameters; they live and move as a pure dict (`hf.load_params`), merged inside jit. The FFN is run
with the tokens' experts, or with all channels when no route is given (the dense model).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from readme_jax.config import ModelConfig
from readme_jax.models import experts, parallel
from readme_jax.models.experts import ExpertTable, Masked, Route
from readme_jax.models.layers import (
    ACTIVATION,
    apply_rope,
    attention,
    cache_mask,
    embed,
    packed_mask,
    positions,
    rms_norm,
    rope_tables,
    windowed,
    write_cache,
)
from readme_jax.sharding import REPLICATED, batch_devices, computed, gather, model_devices, put, stored

Params = dict[str, Any]
Remat = Literal["none", "full", "names"]


def _all_but_weights(primitive, *_, **__) -> bool:
    """Everything is kept for the backward pass but casts and gathers: a layer's whole weights would be kept by every
    layer, and parameters would be at rest on paper only."""
    return primitive.name not in ("convert_element_type", "reshard")


POLICIES: dict[Remat, Callable[..., bool]] = {
    "none": _all_but_weights,
    "full": jax.checkpoint_policies.nothing_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*parallel.REMAT_NAMES),
}


def block_axes(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Logical axes of every parameter of a block (without the leading `layer`): the only list of them."""
    heads, kv_heads = ("head", "head_dim"), ("kv_head", "head_dim")
    axes: dict[str, tuple[str, ...]] = {
        "attn_norm": ("embed",),
        "w_q": (*heads, "embed"),
        "w_k": (*kv_heads, "embed"),
        "w_v": (*kv_heads, "embed"),
        "w_o": ("embed", *heads),
        "mlp_norm": ("embed",),
        "w_gate": ("mlp", "embed"),
        "w_up": ("mlp", "embed"),
        "w_down": ("mlp", "embed"),
    }
    if cfg.qkv_bias:
        axes |= {"b_q": heads, "b_k": kv_heads, "b_v": kv_heads}
    if cfg.out_bias:
        axes |= {"b_o": ("embed",)}
    if cfg.qk_norm:
        axes |= {"q_norm": ("head_dim",), "k_norm": ("head_dim",)}
    if cfg.mlp_bias:
        axes |= {"b_gate": ("mlp",), "b_up": ("mlp",), "b_down": ("embed",)}
    return axes


def weight(cfg: ModelConfig, *axes: str) -> nnx.Param:
    """A declared parameter; its shape follows from its logical axes. Values come from a checkpoint, never from here."""
    return nnx.Param(jnp.zeros([getattr(cfg, axis) for axis in axes], jnp.float32))


class Block(nnx.Module):
    """All decoder blocks, stacked on a leading layer axis; inside the scan an instance holds one layer."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        for name, axes in block_axes(cfg).items():
            setattr(self, name, weight(cfg, "layer", *axes))

    def qkv(self, x_BTD: jax.Array, rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B,T,N,H], keys and values [B,T,K,H] of the normed input, rotated."""

        def project(w, b):
            y = jnp.einsum("btd,nhd->btnh", x_BTD, w[...].astype(x_BTD.dtype))
            return y if b is None else y + b[...].astype(x_BTD.dtype)

        bias = self.cfg.qkv_bias
        q_BTNH = project(self.w_q, self.b_q if bias else None)
        k_BTKH = project(self.w_k, self.b_k if bias else None)
        v_BTKH = project(self.w_v, self.b_v if bias else None)
        if self.cfg.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], self.cfg.norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], self.cfg.norm_eps)
        return apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope), v_BTKH

    def __call__(self, x_BTD: jax.Array, rope, attend: Callable, ffn: Callable):
        """One block. attend(q, k, v) -> [B,T,N,H] owns mask and cache; ffn(x, self) -> (y, what the caller taps)."""
        with jax.named_scope("attention"):
            y_BTNH = attend(*self.qkv(rms_norm(x_BTD, self.attn_norm[...], self.cfg.norm_eps), rope))
            w_DNH = self.w_o[...].astype(x_BTD.dtype)
            y_BTD = jnp.einsum("btnh,dnh->btd", y_BTNH, w_DNH, out_sharding=ACTIVATION)
            x_BTD += y_BTD + self.b_o[...].astype(x_BTD.dtype) if self.cfg.out_bias else y_BTD
        y_BTD, seen = ffn(rms_norm(x_BTD, self.mlp_norm[...], self.cfg.norm_eps), self)
        return x_BTD + y_BTD, seen


class Backbone(nnx.Module):
    """Embedding, stacked blocks, final norm and head: the declaration that gives the parameter tree."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.embedding = weight(cfg, "vocab", "embed")
        self.layers = Block(cfg)
        self.norm = weight(cfg, "embed")
        if not cfg.tied:
            self.head = weight(cfg, "vocab", "embed")


@functools.cache
def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes (float32) of the parameter tree, no memory used."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Backbone(cfg))))


@functools.cache
def _block_graph(cfg: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Block(cfg)))[0]


def _layouts(cfg: ModelConfig, layout: Callable[..., jax.P], axes: dict[str, tuple[str, ...]]) -> dict[str, jax.P]:
    """`layout` (`computed` or `stored`) of every parameter by its axes, on the current mesh."""
    # Query and key heads are split together or not at all: a group of queries lies with its key head.
    whole = ("head", "kv_head") if cfg.kv_head % model_devices() else ()
    return {
        name: layout(tuple(None if a in whole else a for a in parts), tuple(getattr(cfg, a) for a in parts))
        for name, parts in axes.items()
    }


def param_specs(cfg: ModelConfig) -> Params:
    """PartitionSpec of every parameter at rest on the current mesh, same tree as `abstract_params`.

    ConfigError when the FFN channels do not divide the mesh's `model` axis.
    """
    outside: dict[str, tuple[str, ...]] = {"embedding": ("vocab", "embed"), "norm": ("embed",)}
    outside |= {} if cfg.tied else {"head": ("vocab", "embed")}
    layers = {name: ("layer", *axes) for name, axes in block_axes(cfg).items()}
    return _layouts(cfg, stored, outside) | {"layers": _layouts(cfg, stored, layers)}


def place(cfg: ModelConfig, params: Params) -> Params:
    """Put host parameters on the current mesh by the sharding table."""
    return jax.tree.map(put, params, param_specs(cfg))


def place_separate(cfg: ModelConfig, params: Params, count: int) -> Params:
    """Put host parameters with `count` separate experts on the current mesh, whole experts to a device: the FFN's
    [L, E * C, D] as [L, E, C, D]. `parallel.flat_layout` of what comes back to the host undoes it."""
    specs = parallel.separate_specs(param_specs(cfg))
    return jax.tree.map(put, parallel.separate_layout(params, count), specs)


def gathered(cfg: ModelConfig, layer: Params, dtype) -> Block:
    """One layer's parameters out of their stacks, in the layout and dtype of the computation, as a module."""
    layouts = _layouts(cfg, computed, block_axes(cfg))

    def gather_one(name: str, w: jax.Array) -> jax.Array:
        # separate experts, [E, C, D], are used where they lie
        return gather(w, layouts[name], dtype) if w.ndim == len(layouts[name]) else w.astype(dtype)

    return nnx.merge(_block_graph(cfg), {name: gather_one(name, w) for name, w in layer.items()})


def head_weight(params: Params) -> jax.Array:
    """[V, D] of the output head; the embedding when tied."""
    return params["head"] if "head" in params else params["embedding"]


def windows(cfg: ModelConfig) -> jax.Array | None:
    """int32 [L] sliding window per layer, None when every layer sees everything (no mask work in the scan then)."""
    return jnp.array(cfg.windows, jnp.int32) if any(cfg.windows) else None


def packed(cfg: ModelConfig, segments_BT: jax.Array) -> Callable:
    """run(x_BTD, block, window, ffn) -> (x_BTD, what ffn saw): one block over packed records, whose positions and
    attention mask are computed here, once for all blocks. block: see `gathered`; window: its entry of `windows`."""
    positions_BT = positions(segments_BT)
    rope = rope_tables(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    mask_BTT = packed_mask(segments_BT)
    scale = cfg.head_dim**-0.5

    def run(x_BTD: jax.Array, block: Block, window: jax.Array | None, ffn: Callable) -> tuple[jax.Array, Any]:
        def attend(q, k, v):
            limit = windowed(mask_BTT, positions_BT, positions_BT, window) if any(cfg.windows) else mask_BTT
            return attention(q, k, v, limit, scale)

        return block(x_BTD, rope, attend, ffn)

    return run


def forward(
    cfg: ModelConfig,
    params: Params,
    ids_BT: jax.Array,
    segments_BT: jax.Array,
    *,
    table: ExpertTable | None = None,
    route: Route | None = None,
    tap: Callable | None = None,
    dtype=jnp.float32,
    remat: Remat = "none",
) -> tuple[jax.Array, Any]:
    """Final hidden states [B, T, D] (normed, before the head) of packed records, and what `tap` saw in each layer.

    segments_BT: int32, equal ids attend to each other, 0 is padding. route None runs all channels (dense).
    tap(h_BTF, layer, layer's table or None) is called on the input of down_proj in a dense run; its outputs come back
    stacked [L, ...].
    """
    run = packed(cfg, segments_BT)
    by_layer = isinstance(route, Masked) and route.expert_BT.ndim == 3

    def body(x_BTD, layer_inputs):
        layer, layer_table, window, own = layer_inputs

        def ffn(y_BTD, block):
            if tap is not None:
                return experts.dense(y_BTD, block, layer_table, tap)
            return experts.run(y_BTD, block, layer_table, own or route), None

        return run(x_BTD, gathered(cfg, layer, x_BTD.dtype), window, ffn)

    as_stored = batch_devices() == 1 and params["layers"]["w_q"].dtype == dtype
    if remat != "none" or not as_stored:
        body = jax.checkpoint(body, prevent_cse=False, policy=POLICIES[remat])
    x_BTD = embed(params["embedding"], ids_BT, dtype)
    x_BTD, seen = jax.lax.scan(body, x_BTD, (params["layers"], table, windows(cfg), route if by_layer else None))
    return rms_norm(x_BTD, params["norm"], cfg.norm_eps), seen


def unembed(params: Params, x_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V] of hidden states."""
    w_VD = gather(head_weight(params), jax.P(None, None), x_BTD.dtype)
    return jnp.einsum("btd,vd->btv", x_BTD, w_VD, preferred_element_type=jnp.float32, out_sharding=ACTIVATION)


def init_cache(cfg: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Empty key/value cache [L, B, S, K, H]; slot s of a row holds its token at position s."""
    shape = (cfg.layer, batch, slots, cfg.kv_head, cfg.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def step(
    cfg: ModelConfig,
    params: Params,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    cache: dict[str, jax.Array],
    *,
    table: ExpertTable | None = None,
    route: Route | None = None,
    dtype=jnp.float32,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Prefill (T > 1) or decode (T = 1) through the cache: hidden states [B, T, D] and the new cache.

    Rows may hold prompts of different lengths, padded on the right: a slot written by padding is overwritten by the
    token that later takes its position, before any query may see it.
    """
    rope = rope_tables(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    slots = cache["k"].shape[2]
    mask_BTS = cache_mask(positions_BT, slots)
    slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (ids_BT.shape[0], slots))

    def body(carry, layer_inputs):
        x_BTD, k_LBSKH, v_LBSKH = carry
        index, layer, layer_table, window = layer_inputs
        layer, new = gathered(cfg, layer, x_BTD.dtype), {}

        def attend(q, k, v):
            new["k"] = write_cache(k_LBSKH, index, positions_BT, k)
            new["v"] = write_cache(v_LBSKH, index, positions_BT, v)
            limit = windowed(mask_BTS, positions_BT, slot_BS, window) if any(cfg.windows) else mask_BTS
            lies = jax.typeof(q).sharding.spec
            q = jax.reshard(q, REPLICATED)  # as the cache
            return jax.reshard(attention(q, new["k"][index], new["v"][index], limit, cfg.head_dim**-0.5), lies)

        def ffn(y_BTD, block):
            return experts.run(y_BTD, block, layer_table, route), None

        x_BTD, _ = layer(x_BTD, rope, attend, ffn)
        return (x_BTD, new["k"], new["v"]), None

    x_BTD = embed(params["embedding"], ids_BT, dtype)
    inputs = (jnp.arange(cfg.layer), params["layers"], table, windows(cfg))
    (x_BTD, k_LBSKH, v_LBSKH), _ = jax.lax.scan(body, (x_BTD, cache["k"], cache["v"]), inputs)
    return rms_norm(x_BTD, params["norm"], cfg.norm_eps), {"k": k_LBSKH, "v": v_LBSKH}
