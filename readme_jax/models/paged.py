"""Backbone and router over paged keys and values: one layer, or the router, for a segment of B rows x T tokens.

A page holds the keys and values of P consecutive positions of one row; pages of a layer lie in one array, in any order,
and a row's table names its pages by position. Attention runs over blocks of pages with an online softmax (Milakov and
Gimelshein 2018), so the trip count follows from the longest row and one program serves every context length.

Everything lies on one device. Letters beside those of `layers`: S = (pages + 1) * P slots of a layer's keys, of which
the last page is scrap; W pages of a row's table, A slots of a block, O = (N + 2 K) H outputs of the joint projection,
J = K * H.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.models import expert_pages, router
from readme_jax.models.backbone import Params, head_weight
from readme_jax.models.expert_pages import Pages
from readme_jax.models.layers import apply_rope, rms_norm, rope_tables, times
from readme_jax.sharding import REPLICATED

DECODE_BLOCK, PREFILL_BLOCK = 64, 128  # keys of one step of the attention's loop
CPU_ROWS = 16  # rows that decode together on CPU
JOINT_HEADS = 8  # up to this many key heads, one product serves all of them when decoding
NEVER = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B rows of T new tokens: what a segment of a step is about.

    ids_BT, position_BT, expert_BT: int32 of each token. write_BT: int32 slot (page * P + offset) of each token's keys
    and values; padding names a slot of the scrap page. table_BW: int32 pages of a row by position, any page where the
    row has none yet.
    """

    ids_BT: jax.Array
    position_BT: jax.Array
    expert_BT: jax.Array
    write_BT: jax.Array
    table_BW: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values [S, K * H] of one layer, or of all layers of the router one after another, scrap page last."""

    k_SJ: jax.Array
    v_SJ: jax.Array


def layer_weights(cfg: ModelConfig, layers: Params, index: int, dtype) -> Params:
    """One layer's host weights outside its pages, as `layer` reads them: w_qkv [O, D], w_o [D, N * H], b_qkv, vectors.

    One product for queries, keys and values: on CPU 5 times as fast for one row as three with [N, H, D] (docs/LOG.md).
    """
    layer = {name: w[index] for name, w in layers.items() if name not in expert_pages.PAGED}
    d = cfg.embed
    joint_OD = np.concatenate([layer.pop(name).reshape(-1, d) for name in ("w_q", "w_k", "w_v")])
    out = {"w_qkv": joint_OD, "w_o": layer.pop("w_o").reshape(d, -1)}
    if cfg.qkv_bias:
        out["b_qkv"] = np.concatenate([layer.pop(name).reshape(-1) for name in ("b_q", "b_k", "b_v")])
    return {name: np.ascontiguousarray(w, dtype) for name, w in (out | layer).items()}


def write(cache: Cache, write_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Store new keys and values in their slots."""
    at_M = write_BT.reshape(-1)

    def put(old_SJ: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_MJ = new_BTKH.reshape(at_M.shape[0], -1).astype(old_SJ.dtype)
        if len(at_M) == 1:  # XLA would make a scatter of one row a copy of the whole
            return jax.lax.dynamic_update_slice(old_SJ, new_MJ, (at_M[0], 0))
        return old_SJ.at[at_M].set(new_MJ, mode="promise_in_bounds")

    return Cache(put(cache.k_SJ, k_BTKH), put(cache.v_SJ, v_BTKH))


def attention(
    q_BTNH: jax.Array,
    cache: Cache,
    table_BW: jax.Array,
    position_BT: jax.Array,
    window: jax.Array | None,
    *,
    page: int,
    scale: float,
) -> jax.Array:
    """Causal grouped-query attention over the pages, softmax in float32; [B, T, N, H] in the dtype of q.

    window: int32 scalar, keys a query sees back from its own position (0: all); None when no layer has one. With
    position -1 for all, no key is read and the result is zero.
    """
    (b, t, n, h), kv = q_BTNH.shape, cache.k_SJ.shape[1] // q_BTNH.shape[3]
    if t > 1 or not 1 < kv <= JOINT_HEADS:
        q_BKMH = q_BTNH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
        y_BKMH = _attend(q_BKMH, cache, table_BW, position_BT, window, page, scale, PREFILL_BLOCK)
        return y_BKMH.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
    # One row of queries a head: the keys are read as they lie, all heads side by side, by queries that are zero outside
    # their own head. The products with zeros cost less than a transpose of the keys.
    own_KK = jnp.eye(kv, dtype=q_BTNH.dtype)
    q_BKGH = q_BTNH.reshape(b, kv, n // kv, h)
    q_B1NJ = jnp.einsum("bkgh,kj->bkgjh", q_BKGH, own_KK).reshape(b, 1, n, kv * h)

    def whole(q_B1NJ, cache, table_BW, position_BT, window):
        return _attend(q_B1NJ, cache, table_BW, position_BT, window, page, scale, DECODE_BLOCK)

    def parted(q_B1NJ, cache, table_BW, position_BT, window):
        # what a loop's turn reads of more rows falls out of the cores' caches: 32 rows took four times as long as 16
        parts = [slice(i, i + CPU_ROWS) for i in range(0, b, CPU_ROWS)]
        return jnp.concatenate([whole(q_B1NJ[x], cache, table_BW[x], position_BT[x], window) for x in parts])

    inputs = q_B1NJ, cache, table_BW, position_BT, window
    y_B1NJ = jax.lax.platform_dependent(*inputs, cpu=parted, default=whole) if b > CPU_ROWS else whole(*inputs)
    y_BKGKH = y_B1NJ.reshape(b, kv, n // kv, kv, h)
    return jnp.einsum("bkgkh->bkgh", y_BKGKH).reshape(b, t, n, h)


def _attend(
    q_BKMH: jax.Array, cache: Cache, table_BW: jax.Array, position_BT: jax.Array, window, page: int, scale, block: int
) -> jax.Array:
    """`attention` of M = G * T query rows of each key head, queries of a group side by side."""
    (b, kv, m, h), t = q_BKMH.shape, position_BT.shape[1]
    wide = min(max(block // page, 1), table_BW.shape[1])
    block = wide * page
    table_BW = jnp.pad(table_BW, ((0, 0), (0, -table_BW.shape[1] % wide)))

    def keys(pool_SJ: jax.Array, page_BW: jax.Array) -> jax.Array:
        """[B, K, A, H] of a block's pages."""
        pages = pool_SJ.reshape(-1, page, kv * h).at[page_BW].get(mode="promise_in_bounds")
        return pages.reshape(b, block, kv, h).transpose(0, 2, 1, 3).astype(q_BKMH.dtype)

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        most_BKM, sum_BKM, y_BKMH = state
        page_BW = jax.lax.dynamic_slice(table_BW, (0, i * wide), (b, wide))
        k_BKAH, v_BKAH = keys(cache.k_SJ, page_BW), keys(cache.v_SJ, page_BW)
        score_BKMA = jnp.einsum("bkmh,bkah->bkma", q_BKMH, k_BKAH, preferred_element_type=jnp.float32) * scale
        back_BTA = position_BT[:, :, None] - (i * block + jnp.arange(block, dtype=jnp.int32))
        seen_BTA = back_BTA >= 0
        if window is not None:
            seen_BTA &= (back_BTA < window) | (window == 0)
        score_BKGTA = score_BKMA.reshape(b, kv, m // t, t, block)
        score_BKGTA = jnp.where(seen_BTA[:, None, None], score_BKGTA, jnp.float32(NEVER))
        score_BKMA = score_BKGTA.reshape(b, kv, m, block)
        new_BKM = jnp.maximum(most_BKM, jnp.max(score_BKMA, -1))
        weight_BKMA = jnp.exp(score_BKMA - new_BKM[..., None])
        fade_BKM = jnp.exp(most_BKM - new_BKM)
        y_BKMH = y_BKMH * fade_BKM[..., None] + jnp.einsum(
            "bkma,bkah->bkmh", weight_BKMA.astype(v_BKAH.dtype), v_BKAH, preferred_element_type=jnp.float32
        )
        return new_BKM, sum_BKM * fade_BKM + jnp.sum(weight_BKMA, -1), y_BKMH

    # NEVER, not -inf: a block in which a row sees nothing then fades to nothing, and not to NaN
    shape = (b, kv, m)
    start = (jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(q_BKMH.shape, jnp.float32))
    first = jnp.int32(0)
    if window is not None:
        first = jnp.where(window > 0, jnp.maximum(jnp.min(position_BT) - window + 1, 0) // block, 0)
    _, sum_BKM, y_BKMH = jax.lax.fori_loop(first, jnp.max(position_BT) // block + 1, body, start)
    return (y_BKMH / jnp.maximum(sum_BKM, 1e-30)[..., None]).astype(q_BKMH.dtype)


def _project(cfg: ModelConfig, weights: Params, x_BTD: jax.Array, rope) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] of a layer's input, rotated."""
    (b, t, d), n, kv, h = x_BTD.shape, cfg.head, cfg.kv_head, cfg.head_dim
    y_MO = times(rms_norm(x_BTD, weights["attn_norm"], cfg.norm_eps).reshape(b * t, d), weights["w_qkv"])
    if cfg.qkv_bias:
        y_MO += weights["b_qkv"]
    q, k, v = (y.reshape(b, t, -1, h) for y in jnp.split(y_MO, (n * h, (n + kv) * h), axis=1))
    if cfg.qk_norm:
        q, k = rms_norm(q, weights["q_norm"], cfg.norm_eps), rms_norm(k, weights["k_norm"], cfg.norm_eps)
    return apply_rope(q, rope), apply_rope(k, rope), v


def _add(cfg: ModelConfig, weights: Params, x_BTD: jax.Array, y_BTNH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The residual after attention, with the output bias of the FFN, and its norm for the FFN."""
    b, t, d = x_BTD.shape
    x_BTD += times(y_BTNH.reshape(b * t, -1), weights["w_o"]).reshape(b, t, d)
    if cfg.out_bias:
        x_BTD += weights["b_o"]
    normed_BTD = rms_norm(x_BTD, weights["mlp_norm"], cfg.norm_eps)
    return x_BTD + weights["b_down"] if cfg.mlp_bias else x_BTD, normed_BTD


def mix(
    cfg: ModelConfig,
    weights: Params,
    cache: Cache,
    x_BTD: jax.Array,
    rows: Rows,
    window: jax.Array | None,
    *,
    page: int,
) -> tuple[tuple[jax.Array, jax.Array], Cache]:
    """Attention of one layer: (the residual after it, its norm for the FFN), and the cache."""
    with jax.named_scope("attention"):
        rope = rope_tables(rows.position_BT, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        q, k, v = _project(cfg, weights, x_BTD, rope)
        cache = write(cache, rows.write_BT, k, v)
        scale = cfg.head_dim**-0.5
        y_BTNH = attention(q, cache, rows.table_BW, rows.position_BT, window, page=page, scale=scale)
        return _add(cfg, weights, x_BTD, y_BTNH), cache


def layer(
    cfg: ModelConfig,
    weights: Params,
    embedding_VD: jax.Array,
    cache: Cache,
    stream: tuple[jax.Array, jax.Array],
    rows: Rows,
    pages: Pages,
    listed: tuple[jax.Array, jax.Array, jax.Array],
    window: jax.Array | None,
    *,
    start: jax.Array,
    fresh: jax.Array,
    page: int,
) -> tuple[tuple[jax.Array, jax.Array], Cache]:
    """One layer, or one more pass over its FFN. stream: (residual [B, T, D], its norm for the FFN).

    listed: (slots [N], items [N], count) of the pages that this pass reads. start: the first layer, which takes the
    tokens' embedding for the residual. fresh: attention first; else the pages only, on the norm that the layer's first
    pass left: a layer whose pages do not fit in the pool is run in parts.
    """
    x_BTD, normed_BTD = stream
    (b, t, _), n, kv, h = x_BTD.shape, cfg.head, cfg.kv_head, cfg.head_dim
    with jax.named_scope("attention"):
        x_BTD = jnp.where(start, embedding_VD[rows.ids_BT].astype(x_BTD.dtype), x_BTD)
        rope = rope_tables(rows.position_BT, h, cfg.rope_theta, cfg.rope_scaling)

        def nothing(_):
            return tuple(jnp.zeros((b, t, heads, h), x_BTD.dtype) for heads in (n, kv, kv))

        # The cache goes through no `cond`: XLA would copy it. A later pass writes to no slot and looks at no key.
        q, k, v = jax.lax.cond(fresh, lambda x: _project(cfg, weights, x, rope), nothing, x_BTD)
        cache = write(cache, jnp.where(fresh, rows.write_BT, cache.k_SJ.shape[0] - 1), k, v)
        y_BTNH = attention(
            q, cache, rows.table_BW, jnp.where(fresh, rows.position_BT, -1), window, page=page, scale=h**-0.5
        )
        x_BTD, normed_BTD = jax.lax.cond(
            fresh, lambda x, _: _add(cfg, weights, x, y_BTNH), lambda *old: old, x_BTD, normed_BTD
        )
    with jax.named_scope("experts"):
        x_MD = normed_BTD.reshape(b * t, -1)
        y_MD = expert_pages.ffn(x_MD, pages, *listed, rows.expert_BT.reshape(-1))
    return (x_BTD + y_MD.reshape(x_BTD.shape), normed_BTD), cache


def logits(cfg: ModelConfig, params: Params, x_BD: jax.Array) -> jax.Array:
    """float32 [V, B] of the residual stream after the last layer, in the order that CPUs multiply fastest in."""
    x_BD = rms_norm(x_BD, params["norm"], cfg.norm_eps)
    w_VD = head_weight(params)
    return jnp.einsum("vd,bd->vb", w_VD.astype(x_BD.dtype), x_BD, preferred_element_type=jnp.float32)


def router_attention(
    cfg: RouterConfig, q, k, v, index: jax.Array, cache: Cache, rows: Rows, *, page: int
) -> tuple[jax.Array, Cache]:
    """Layer `index` of the router's attention; the cache as in `route`."""
    slots = (cache.k_SJ.shape[0] - page) // cfg.layers
    scrap = rows.write_BT >= slots
    at_BT = jnp.where(scrap, cache.k_SJ.shape[0] - 1, rows.write_BT + index * slots)
    cache = write(cache, at_BT, k, v)
    table_BW, scale = rows.table_BW + index * (slots // page), router.ATTENTION_SCALE
    return attention(q, cache, table_BW, rows.position_BT, None, page=page, scale=scale), cache


def route(
    cfg: RouterConfig, params: Params, cache: Cache, rows: Rows, theta: float, *, page: int
) -> tuple[jax.Array, Cache]:
    """The router on B rows of T tokens: int32 experts [B, T] and its cache. rows.expert_BT is not looked at.

    The cache holds the router's layers one after another, without scrap, and one scrap page.
    """

    def attend(q, k, v, index, cache):
        place = jax.typeof(q).sharding.spec
        q, k, v = jax.reshard((q, k, v), REPLICATED)
        y_BTNH, cache = router_attention(cfg, q, k, v, index, cache, rows, page=page)
        return jax.reshard(y_BTNH, place), cache

    logits_BTE, cache = router.trunk(cfg, params, rows.ids_BT, rows.position_BT, theta, attend, cache)
    return jax.reshard(jnp.argmax(logits_BTE, -1).astype(jnp.int32), REPLICATED), cache
