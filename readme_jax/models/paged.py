"""Backbone and router over paged keys and values: one layer, or the router, for a segment of B rows x T tokens.

A page holds the keys and values of P consecutive positions of one row; pages of a layer lie in one array, in any order,
and a row's table names its pages by position. Attention runs over blocks of pages with an online softmax (Milakov and
Gimelshein 2018), so the trip count follows from the longest row and one program serves every context length.

Letters beside those of `layers`: S = pages * P slots of a layer's keys, W pages of a row's table, A slots of a block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from readme_jax.config import ModelConfig, RouterConfig
from readme_jax.models import backbone, expert_pages, router
from readme_jax.models.expert_pages import Pages
from readme_jax.models.layers import embed, rms_norm, rope_tables
from readme_jax.sharding import REPLICATED

BLOCK_TOKENS = 128  # keys of one step of the attention's loop
NEVER = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B rows of T new tokens: what a segment of a step is about.

    ids_BT, position_BT, expert_BT: int32 of each token. write_BT: int32 slot (page * P + offset) of each token's keys
    and values; a slot past the pool is written nowhere, which is what padding names. table_BW: int32 pages of a row by
    position, any page where the row has none yet.
    """

    ids_BT: jax.Array
    position_BT: jax.Array
    expert_BT: jax.Array
    write_BT: jax.Array
    table_BW: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values [S, K, H] of one layer, or of all layers of the router one after another."""

    k_SKH: jax.Array
    v_SKH: jax.Array


def write(cache: Cache, write_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Store new keys and values in their slots."""
    at_M = write_BT.reshape(-1)

    def put(old_SKH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_MKH = new_BTKH.reshape(-1, *new_BTKH.shape[2:]).astype(old_SKH.dtype)
        return old_SKH.at[at_M].set(new_MKH, mode="drop")

    return Cache(put(cache.k_SKH, k_BTKH), put(cache.v_SKH, v_BTKH))


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

    window: int32 scalar, keys a query sees back from its own position (0: all); None when no layer has one.
    """
    (b, t, n, h), kv = q_BTNH.shape, cache.k_SKH.shape[1]
    wide = min(max(BLOCK_TOKENS // page, 1), table_BW.shape[1])
    block = wide * page
    table_BW = jnp.pad(table_BW, ((0, 0), (0, -table_BW.shape[1] % wide)))
    q_BKMH = q_BTNH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)

    def gathered(pool_SKH: jax.Array, page_BW: jax.Array) -> jax.Array:
        """[B, K, A, H] of a block's pages."""
        pages = pool_SKH.reshape(-1, page, kv, h)[page_BW]
        return pages.reshape(b, block, kv, h).transpose(0, 2, 1, 3).astype(q_BTNH.dtype)

    def body(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        most_BKM, sum_BKM, y_BKMH = state
        page_BW = jax.lax.dynamic_slice(table_BW, (0, i * wide), (b, wide))
        k_BKAH, v_BKAH = gathered(cache.k_SKH, page_BW), gathered(cache.v_SKH, page_BW)
        score_BKMA = jnp.einsum("bkmh,bkah->bkma", q_BKMH, k_BKAH, preferred_element_type=jnp.float32) * scale
        back_BTA = position_BT[:, :, None] - (i * block + jnp.arange(block, dtype=jnp.int32))
        seen_BTA = back_BTA >= 0
        if window is not None:
            seen_BTA &= (back_BTA < window) | (window == 0)
        score_BKGTA = score_BKMA.reshape(b, kv, -1, t, block)
        score_BKMA = jnp.where(seen_BTA[:, None, None], score_BKGTA, jnp.float32(NEVER)).reshape(score_BKMA.shape)
        new_BKM = jnp.maximum(most_BKM, jnp.max(score_BKMA, -1))
        weight_BKMA = jnp.exp(score_BKMA - new_BKM[..., None])
        fade_BKM = jnp.exp(most_BKM - new_BKM)
        y_BKMH = y_BKMH * fade_BKM[..., None] + jnp.einsum(
            "bkma,bkah->bkmh", weight_BKMA.astype(v_BKAH.dtype), v_BKAH, preferred_element_type=jnp.float32
        )
        return new_BKM, sum_BKM * fade_BKM + jnp.sum(weight_BKMA, -1), y_BKMH

    shape = q_BKMH.shape[:-1]
    # NEVER, not -inf: a block in which a row sees nothing must fade to nothing later, and not to NaN
    start = (jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(q_BKMH.shape, jnp.float32))
    first = jnp.int32(0)
    if window is not None:
        first = jnp.where(window > 0, jnp.maximum(jnp.min(position_BT) - window + 1, 0) // block, 0)
    _, sum_BKM, y_BKMH = jax.lax.fori_loop(first, jnp.max(position_BT) // block + 1, body, start)
    y_BKMH = (y_BKMH / sum_BKM[..., None]).astype(q_BTNH.dtype)
    return y_BKMH.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def layer(
    cfg: ModelConfig,
    weights: backbone.Params,
    cache: Cache,
    stream: tuple[jax.Array, jax.Array],
    rows: Rows,
    pages: Pages,
    listed: tuple[jax.Array, jax.Array, jax.Array],
    window: jax.Array | None,
    fresh: jax.Array,
    *,
    page: int,
) -> tuple[tuple[jax.Array, jax.Array], Cache]:
    """One layer, or one more wave of its FFN. stream: (residual [B, T, D], its norm for the FFN).

    fresh: attention first, then the listed pages of the FFN; else the listed pages only, on the norm that the layer's
    first wave left, so that a layer whose pages do not fit is run in parts. listed: (slots [N], items [N], count).
    """
    def mixed(x_BTD, cache):
        rope = rope_tables(rows.position_BT, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        block, new = backbone.without_channels(cfg, weights), [cache]

        def attend(q, k, v):
            place = jax.typeof(q).sharding.spec
            q, k, v = jax.reshard((q, k, v), REPLICATED)
            new[0] = write(cache, rows.write_BT, k, v)
            y = attention(
                q, new[0], rows.table_BW, rows.position_BT, window, page=page, scale=cfg.head_dim**-0.5
            )
            return jax.reshard(y, place)

        x_BTD, normed_BTD = block.mix(x_BTD, rope, attend)
        if cfg.mlp_bias:
            x_BTD += weights["b_down"].astype(x_BTD.dtype)
        return (x_BTD, normed_BTD), new[0]

    (x_BTD, normed_BTD), cache = jax.lax.cond(
        fresh, mixed, lambda x, cache: ((x, stream[1]), cache), stream[0], cache
    )
    b, t, d = x_BTD.shape
    with jax.named_scope("experts"):
        x_MD = jax.reshard(normed_BTD, REPLICATED).reshape(b * t, d)
        y_MD = expert_pages.portable(x_MD, pages, *listed, rows.expert_BT.reshape(-1))
        y_BTD = jax.reshard(y_MD.reshape(b, t, d), jax.typeof(x_BTD).sharding.spec)
    return (x_BTD + y_BTD, normed_BTD), cache
