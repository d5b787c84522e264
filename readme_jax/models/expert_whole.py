"""The FFN with every page of a layer in its place, for CPUs whose memory holds all pages; else `expert_pages`.

XLA's CPU backend spreads only large products over the cores, and would have to copy pages of a pool together first. So
a layer's pages lie in two arrays, weights on the left of the tokens, [out, in] @ [in, M]: for 2 to 32 tokens that takes
half of the time of the other order (docs/LOG.md). One token reads the pages of its expert only.

Letters as in `expert_pages`; P pages of a layer, U = P * R channels in the pages' order.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.models.expert_kernels import keep
from readme_jax.models.expert_pages import host_pages
from readme_jax.models.layers import times


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """One layer. wide_PQD: gate rows, then up rows, of each page, Q = 2R. down_DU. member_WU: uint32, see
    `expert_kernels.Pages`. bias_P2R: biases of gate and up, None for families without."""

    wide_PQD: jax.Array
    down_DU: jax.Array
    member_WU: jax.Array
    bias_P2R: jax.Array | None = None


def host_whole(pages_PQD: np.ndarray, member_PWR: np.ndarray, bias_P2R: np.ndarray | None) -> Whole:
    """NumPy arrays of `Whole` from a layer's part of `expert_pages.host_pages`, `member_bits` and `host_biases`."""
    rows = member_PWR.shape[2]
    wide_PQD, down_PRD = pages_PQD[:, : 2 * rows], pages_PQD[:, 2 * rows :]
    down_DU = down_PRD.reshape(-1, pages_PQD.shape[2]).T
    member_WU = member_PWR.transpose(1, 0, 2).reshape(member_PWR.shape[1], -1)
    return Whole(*map(np.ascontiguousarray, (wide_PQD, down_DU, member_WU)), bias_P2R)  # pyright: ignore


def host_layers(
    layers: dict[str, np.ndarray], order_LR: np.ndarray, member_IWR: np.ndarray, bias_I2R: np.ndarray | None, dtype
) -> Iterator[Whole]:
    """`host_whole` of one layer after another, each only while it is looked at. layers, order_LR: as for
    `expert_pages.host_pages`; member_IWR, bias_I2R: of all layers' pages."""
    page = member_IWR.shape[2]
    pages = order_LR.shape[1] // page
    for index in range(len(order_LR)):
        mine, items = slice(index, index + 1), slice(index * pages, (index + 1) * pages)
        one = {name: layers[name][mine] for name in ("w_gate", "w_up", "w_down")}
        pages_PQD = host_pages(one, order_LR[mine], page).astype(dtype)
        yield host_whole(pages_PQD, member_IWR[items], None if bias_I2R is None else bias_I2R[items])


def host_lists(touch_LPE: np.ndarray) -> np.ndarray:
    """int32 [E, L, P + 1]: the pages that an expert touches in a layer, in order, and last their count."""
    touch_ELP = touch_LPE.transpose(2, 0, 1)
    order_ELP = np.argsort(~touch_ELP, axis=2, kind="stable")
    return np.concatenate([order_ELP, touch_ELP.sum(2, keepdims=True)], axis=2).astype(np.int32)


def ffn(x_MD: jax.Array, whole: Whole, expert_M: jax.Array) -> jax.Array:
    """[M, D]: for each token the sum over its expert's channels, as `expert_pages.ffn`; all pages are read."""
    (p, q, d), m = whole.wide_PQD.shape, len(x_MD)
    wide_P2RM = times(x_MD, whole.wide_PQD.reshape(p * q, d)).T.reshape(p, 2, q // 2, m)
    if whole.bias_P2R is not None:
        wide_P2RM += whole.bias_P2R[..., None].astype(x_MD.dtype)
    h_UM = (jax.nn.silu(wide_P2RM[:, 0]) * wide_P2RM[:, 1]).reshape(-1, m)
    h_UM = jnp.where(keep([word_U[:, None] for word_U in whole.member_WU], expert_M[None]), h_UM, 0)
    return times(h_UM.T, whole.down_DU)


def listed(x_1D: jax.Array, whole: Whole, list_X: jax.Array, expert_1: jax.Array) -> jax.Array:
    """[1, D]: `ffn` of one token, over the pages of its expert only. list_X: the layer's row of `host_lists`."""
    (_, q, d), rows = whole.wide_PQD.shape, whole.wide_PQD.shape[1] // 2

    def body(i: jax.Array, y_1D: jax.Array) -> jax.Array:
        page = list_X[i]
        w_QD = jax.lax.dynamic_slice(whole.wide_PQD, (page, 0, 0), (1, q, d))[0]
        wide_1Q = x_1D @ jax.lax.optimization_barrier(w_QD).T
        if whole.bias_P2R is not None:
            wide_1Q += whole.bias_P2R[page].reshape(1, q).astype(x_1D.dtype)
        h_1R = jax.nn.silu(wide_1Q[:, :rows]) * wide_1Q[:, rows:]
        member_W1R = jax.lax.dynamic_slice(whole.member_WU, (0, page * rows), (len(whole.member_WU), rows))[:, None]
        h_1R = jnp.where(keep([word_1R for word_1R in member_W1R], expert_1[:, None]), h_1R, 0)
        w_DR = jax.lax.optimization_barrier(jax.lax.dynamic_slice(whole.down_DU, (0, page * rows), (d, rows)))
        return y_1D + jnp.matmul(h_1R, w_DR.T, preferred_element_type=jnp.float32)

    y_1D = jax.lax.fori_loop(0, list_X[-1], body, jnp.zeros(x_1D.shape, jnp.float32))
    return y_1D.astype(x_1D.dtype)
