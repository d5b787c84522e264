"""The pieces every decoder block is made of: norm, rotary embedding, attention, positions, linear maps.

Letters used in all suffixes and einsums: B batch, T query position, S key position, D model width, F dense FFN width,
C channels of an expert, E experts, L layers, N query heads, K key/value heads, G queries per key head, H head width,
V vocabulary, M flat tokens (B*T), U channels used by any expert, R router width.
"""

import functools
import math

import jax
import jax.numpy as jnp

from readme_jax.config import RopeScaling
from readme_jax.sharding import spec

ACTIVATION = spec("batch", "seq", None)
FEW_ROWS = 64  # tokens up to which `times` has the weight on the left


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm in float32, cast back to the input dtype before the scale (as Hugging Face Llama)."""
    x32_BTD = x_BTD.astype(jnp.float32)
    x32_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + eps)
    # Broadcast in one go: its gradient is then one sum over B and T. With B of 1, `*` would leave B out of the sum, and
    # XLA's CPU backend takes 25 times as long for that.
    scale_D, place = scale_D.astype(x_BTD.dtype), jax.typeof(x_BTD).sharding
    return x32_BTD.astype(x_BTD.dtype) * jax.lax.broadcast_in_dim(
        scale_D, x_BTD.shape, (x_BTD.ndim - 1,), out_sharding=place
    )


def flat(x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] -> [M, D] with M = B * T. The gradient of a matmul's weight is then a sum over one axis; over two, XLA
    transposes the whole activation first."""
    batch, seq, width = jax.typeof(x_BTD).sharding.spec
    assert seq is None, "tokens of a row lie together"
    return jnp.reshape(x_BTD, (-1, x_BTD.shape[-1]), out_sharding=jax.P(batch, width))


def linear(x_BTD: jax.Array, w_OD: jax.Array, b_O: jax.Array | None = None) -> jax.Array:
    """x @ w^T + b, the weight in Hugging Face's [out, in] orientation, computed in the dtype of x."""
    y_BTO = jnp.einsum("btd,od->bto", x_BTD, w_OD.astype(x_BTD.dtype), out_sharding=ACTIVATION)
    return y_BTO if b_O is None else y_BTO + b_O.astype(x_BTD.dtype)


def times(x_MD: jax.Array, w_OD: jax.Array) -> jax.Array:
    """x @ w^T of a serving step. On CPU a few rows stand on the right of the weight: XLA then does not pack the weight
    anew for every product, and takes half of the time (docs/LOG.md)."""

    def right(x_MD: jax.Array, w_OD: jax.Array) -> jax.Array:
        # without the barrier XLA turns the product round again
        return jax.lax.optimization_barrier(w_OD @ x_MD.T).T

    def left(x_MD: jax.Array, w_OD: jax.Array) -> jax.Array:
        return x_MD @ w_OD.T

    if 1 < len(x_MD) <= FEW_ROWS:
        return jax.lax.platform_dependent(x_MD, w_OD, cpu=right, default=left)
    return left(x_MD, w_OD)


def embed(table_VD: jax.Array, ids_BT: jax.Array, dtype) -> jax.Array:
    """Rows of a token table, [B, T, D] in `dtype`.

    A table whose width is split over the batch's devices is not gathered: each device looks up its columns for the
    tokens of all, and one all-to-all (of activations in `dtype`, not of the table) brings them where the tokens are.
    Nor is its gradient: a device adds up its own columns.
    """
    columns = jax.typeof(table_VD).sharding.spec[1]
    if columns is None:
        return table_VD.at[ids_BT].get(out_sharding=ACTIVATION).astype(dtype)
    all_BT = jax.reshard(ids_BT, jax.P(None, None))
    x_BTD = table_VD.at[all_BT].get(out_sharding=jax.P(None, None, columns)).astype(dtype)
    # Where only `data` splits the columns: the all-to-all over `data`, then a slice over `expert`. In one go the XLA of
    # jax 0.12 dies ("Could not slice dimension") when `expert` is no power of two.
    return jax.reshard(jax.reshard(x_BTD, jax.P(columns, None, None)), ACTIVATION)


def positions(segments_BT: jax.Array) -> jax.Array:
    """Position of each token within its own segment (int32 [B, T]); a segment is a run of equal ids."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    previous_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start_BT = jnp.where(segments_BT != previous_BT, index_BT, 0)
    return index_BT - jax.lax.cummax(start_BT, axis=1)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Inverse wavelengths, float32 [H/2]. `llama3`: long wavelengths divided by `factor`, a smooth band between."""
    inv_H = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if scaling is None:
        return inv_H
    if scaling.kind == "linear":
        return inv_H / scaling.factor
    wavelength_H = 2 * math.pi / inv_H
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    blend_H = (scaling.original_max_position / wavelength_H - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between_H = (1 - blend_H) * inv_H / scaling.factor + blend_H * inv_H
    scaled_H = jnp.where(wavelength_H > longest, inv_H / scaling.factor, between_H)
    return jnp.where(wavelength_H < shortest, inv_H, scaled_H)


def rope_tables(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the rotary angles, float32 [B, T, 1, H/2]."""
    angle_BTH = positions_BT[..., None].astype(jnp.float32) * rope_frequencies(head_dim, theta, scaling)
    return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the two halves of each head (Hugging Face's order, not interleaved pairs)."""
    cos, sin = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """Grouped-query attention, softmax in float32. mask_BTS: True where the query may see the key. Returns [B,T,N,H].

    Query head n reads key head n // G. A row of the mask with no True gives a finite average, not NaN, and has no
    meaningful gradient. The backward pass computes the weights anew: kept, they would be N * T * S floats a layer.
    """
    b, t, n, h = q_BTNH.shape
    k = k_BSKH.shape[2]
    # Said, because a reshape that adds or drops an axis of length 1 may lose the batch's place on the mesh.
    batch, _, heads, _ = jax.typeof(q_BTNH).sharding.spec
    q_BTKGH = jnp.reshape(q_BTNH, (b, t, k, n // k, h), out_sharding=jax.P(batch, None, heads, None, None))
    # Rows of all queries of a key head together: both products are plain batched matmuls, none transposes T x S.
    q_BKMH = jnp.reshape(
        jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4)), (b, k, -1, h), out_sharding=jax.P(batch, heads, None, None)
    )
    k_BKSH, v_BKSH = jnp.transpose(k_BSKH, (0, 2, 1, 3)), jnp.transpose(v_BSKH, (0, 2, 1, 3))
    y_BKMH = _attend(q_BKMH, k_BKSH, v_BKSH, mask_BTS, scale)
    y_BKGTH = jnp.reshape(y_BKMH, (b, k, n // k, t, h), out_sharding=jax.P(batch, heads, None, None, None))
    y_BTKGH = jnp.transpose(y_BKGTH, (0, 3, 1, 2, 4))
    return jnp.reshape(y_BTKGH, (b, t, n, h), out_sharding=jax.P(batch, None, heads, None))


def _weights(q_BKMH: jax.Array, k_BKSH: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """float32 softmax weights [B, K, M, S] of M = G * T query rows."""
    (b, t, s), (_, k, m, _) = mask_BTS.shape, q_BKMH.shape
    batch, heads, _, _ = jax.typeof(q_BKMH).sharding.spec
    score_BKMS = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * scale
    score_BKGTS = jnp.reshape(score_BKMS, (b, k, m // t, t, s), out_sharding=jax.P(batch, heads, None, None, None))
    score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS, jnp.float32(-1e30))
    return jnp.reshape(jax.nn.softmax(score_BKGTS), (b, k, m, s), out_sharding=jax.P(batch, heads, None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BKMH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    weight_BKMS = _weights(q_BKMH, k_BKSH, mask_BTS, scale).astype(v_BKSH.dtype)
    return jnp.einsum("bkms,bksh->bkmh", weight_BKMS, v_BKSH)


def _attend_forward(q_BKMH, k_BKSH, v_BKSH, mask_BTS, scale):
    y_BKMH = _attend(q_BKMH, k_BKSH, v_BKSH, mask_BTS, scale)
    return y_BKMH, (q_BKMH, k_BKSH, v_BKSH, mask_BTS, y_BKMH)


def _attend_backward(scale, saved, grad_BKMH):
    # The backward pass of FlashAttention (Dao et al. 2022, appendix B.4), not tiled: the sum over S of the softmax's
    # gradient is a sum over H of y * dy.
    q_BKMH, k_BKSH, v_BKSH, mask_BTS, y_BKMH = saved
    weight_BKMS = _weights(q_BKMH, k_BKSH, mask_BTS, scale)
    grad_v = jnp.einsum("bkms,bkmh->bksh", weight_BKMS.astype(grad_BKMH.dtype), grad_BKMH)
    sum_BKM1 = jnp.sum(grad_BKMH.astype(jnp.float32) * y_BKMH.astype(jnp.float32), -1, keepdims=True)
    grad_BKMS = jnp.einsum("bkmh,bksh->bkms", grad_BKMH, v_BKSH, preferred_element_type=jnp.float32)
    score_BKMS = (weight_BKMS * (grad_BKMS - sum_BKM1) * scale).astype(q_BKMH.dtype)
    grad_q = jnp.einsum("bkms,bksh->bkmh", score_BKMS, k_BKSH)
    grad_k = jnp.einsum("bkms,bkmh->bksh", score_BKMS, q_BKMH)
    return grad_q, grad_k, grad_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def packed_mask(segments_BT: jax.Array) -> jax.Array:
    """Causal mask within each document of packed records, bool [B, T, T]. Segment 0 (padding) sees only itself."""
    t = segments_BT.shape[1]
    causal_TS = jnp.tril(jnp.ones((t, t), bool))
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return causal_TS & same_BTS


def cache_mask(positions_BT: jax.Array, slots: int) -> jax.Array:
    """Mask over cache slots, bool [B, T, S]: slot s holds position s, a query sees slots up to its own position."""
    return jnp.arange(slots, dtype=jnp.int32) <= positions_BT[:, :, None]


def windowed(mask_BTS: jax.Array, query_BT: jax.Array, key_BS: jax.Array, window: jax.Array) -> jax.Array:
    """Restrict a mask to the last `window` positions (0: no limit), window int32 scalar, traced per layer."""
    near_BTS = query_BT[:, :, None] - key_BS[:, None, :] < window
    return mask_BTS & (near_BTS | (window == 0))


def write_cache(cache_LBSKH: jax.Array, layer: jax.Array, positions_BT: jax.Array, new_BTKH: jax.Array) -> jax.Array:
    """Store keys or values of one layer in the slots named by their positions; the cache is not split over the mesh."""
    row_B1 = jnp.arange(new_BTKH.shape[0])[:, None]
    new_BTKH = jax.reshard(new_BTKH, jax.P()).astype(cache_LBSKH.dtype)
    return cache_LBSKH.at[layer, row_B1, positions_BT].set(new_BTKH)
