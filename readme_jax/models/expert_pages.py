"""The FFN over pages of channels: only the pages that the batch's experts touch are read (DESIGN 4).

A page holds R channels of one layer as one block [3R, D]: R rows of gate, R of up, R of down. Pages of all layers lie
in one pool of S slots, in any order; a list of (slot, item) says which pages a layer reads, and `member` which experts
have which of a page's channels. One list serves every expert in the batch; lists may be run one after another.

Letters beside those of `layers`: S slots of the pool, I items (layer * pages + page), N entries of a list, R channels
of a page, Q = 3R rows of a page, M tokens, W words of 32 experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.models import expert_kernels
from readme_jax.models.expert_kernels import WORD, Pages, keep

PAGED = ("w_gate", "w_up", "w_down", "b_gate", "b_up")  # parameters of a layer that pages hold


def member_bits(touch_IER: np.ndarray) -> np.ndarray:
    """uint32 [I + 1, W, R] of membership bool [I, E, R]; the last item is nobody's."""
    items, count, rows = touch_IER.shape
    bits = np.zeros((items + 1, -(-count // WORD), rows), np.uint32)
    for e in range(count):
        bits[:-1, e // WORD] |= touch_IER[:, e].astype(np.uint32) << np.uint32(e % WORD)
    return bits


def host_pages(layers: dict[str, np.ndarray], order_LR: np.ndarray, page: int) -> np.ndarray:
    """All pages [I, 3R, D] of host weights w_gate, w_up, w_down [L, F, D], rows as `order_LR` (-1: zeros)."""
    parts = []
    for name in ("w_gate", "w_up", "w_down"):
        rows_LRD = np.take_along_axis(layers[name], np.maximum(order_LR, 0)[..., None], axis=1)
        rows_LRD = np.where((order_LR >= 0)[..., None], rows_LRD, 0)
        parts.append(rows_LRD.reshape(-1, page, rows_LRD.shape[-1]))
    return np.concatenate(parts, axis=1)


def host_biases(layers: dict[str, np.ndarray], order_LR: np.ndarray, page: int) -> np.ndarray:
    """Biases [I + 1, 2, R] of gate and up, in the pages' order; the last item is nobody's."""
    parts = [
        np.where(order_LR >= 0, np.take_along_axis(layers[name], np.maximum(order_LR, 0), axis=1), 0).reshape(-1, page)
        for name in ("b_gate", "b_up")
    ]
    bias_I2R = np.stack(parts, axis=1)
    return np.concatenate([bias_I2R, np.zeros_like(bias_I2R[:1])])


def membership(table_LEC: np.ndarray, order_LR: np.ndarray, page: int) -> np.ndarray:
    """bool [I, E, R]: expert e has the channel in row r of an item."""
    layers, experts, _ = table_LEC.shape
    width = int(max(table_LEC.max(), order_LR.max())) + 1
    member_LEF = np.zeros((layers, experts, width), bool)
    np.put_along_axis(member_LEF, table_LEC.astype(np.int64), True, axis=-1)
    member_LER = np.take_along_axis(member_LEF, np.maximum(order_LR, 0)[:, None], axis=2) & (order_LR >= 0)[:, None]
    return member_LER.reshape(layers, experts, -1, page).transpose(0, 2, 1, 3).reshape(-1, experts, page)


def block_pages(tokens: int) -> int:
    """Pages that the portable path takes at a time, by what was measured on CPU (docs/LOG.md)."""
    return 1 if tokens <= 8 else 16


def portable(
    x_MD: jax.Array, pages: Pages, slot_N: jax.Array, item_N: jax.Array, count: jax.Array, expert_M: jax.Array
) -> jax.Array:
    """`ffn` in plain JAX: a loop over blocks of pages whose trip count follows from `count`."""
    (m, d), group = x_MD.shape, min(block_pages(x_MD.shape[0]), slot_N.shape[0])
    rows, nobody = pages.pool_SQD.shape[1] // 3, pages.member_IWR.shape[0] - 1

    def take(slot_G: jax.Array, first: int, size: int) -> jax.Array:
        """[G * size, D]: these rows of each page."""
        if group == 1:
            w_CD = jax.lax.dynamic_slice(pages.pool_SQD, (slot_G[0], first, 0), (1, size, d))[0]
            return jax.lax.optimization_barrier(w_CD.astype(x_MD.dtype))
        one = functools.partial(jax.lax.dynamic_slice, pages.pool_SQD, slice_sizes=(1, size, d))
        w_CD = jax.vmap(lambda slot: one((slot, first, 0)))(slot_G).reshape(group * size, d)
        return jax.lax.optimization_barrier(w_CD.astype(x_MD.dtype))

    def body(i: jax.Array, y_MD: jax.Array) -> jax.Array:
        # `dynamic_slice` would move the last block back: padding makes the lists whole blocks
        slot_G = jax.lax.dynamic_slice(slot_N, (i * group,), (group,))
        item_G = jax.lax.dynamic_slice(item_N, (i * group,), (group,))
        # what the list holds past `count` may be pages of another pass
        item_G = jnp.where(i * group + jnp.arange(group) < count, item_G, nobody)
        wide_MG2R = jnp.einsum("md,cd->mc", x_MD, take(slot_G, 0, 2 * rows)).reshape(m, group, 2, rows)
        if pages.bias_I2R is not None:
            wide_MG2R += pages.bias_I2R[item_G].astype(x_MD.dtype)
        h_MGR = jax.nn.silu(wide_MG2R[:, :, 0]) * wide_MG2R[:, :, 1]
        member_WC = pages.member_IWR[item_G].transpose(1, 0, 2).reshape(-1, group * rows)
        member_W1C = [member_WC[w : w + 1] for w in range(len(member_WC))]
        h_MC = jnp.where(keep(member_W1C, expert_M[:, None]), h_MGR.reshape(m, -1), 0)
        return y_MD + jnp.matmul(h_MC, take(slot_G, 2 * rows, rows), preferred_element_type=jnp.float32)

    spare = -slot_N.shape[0] % group
    slot_N, item_N = jnp.pad(slot_N, (0, spare)), jnp.pad(item_N, (0, spare), constant_values=nobody)
    y_MD = jax.lax.fori_loop(0, -(-count // group), body, jnp.zeros((m, d), jnp.float32))
    return y_MD.astype(x_MD.dtype)


def ffn(
    x_MD: jax.Array, pages: Pages, slot_N: jax.Array, item_N: jax.Array, count: jax.Array, expert_M: jax.Array
) -> jax.Array:
    """[M, D]: sum over the first `count` listed pages of the channels that each token's expert has.

    slot_N, item_N: int32, where each page lies and which one it is; what stands past `count` is ignored. expert_M:
    int32 expert of each token. Without the bias of down, which is not a page's. Pallas kernels on TPU and on NVIDIA
    GPUs, plain JAX elsewhere.
    """
    ways = {"tpu": expert_kernels.tpu, "default": portable}
    if expert_kernels.triton is not None:
        ways["cuda"] = expert_kernels.gpu
    return jax.lax.platform_dependent(x_MD, pages, slot_N, item_N, count, expert_M, **ways)
