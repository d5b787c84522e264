"""Attention over pages and the paged router against part 1's attention and router, whatever lies where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_core import random_params

from readme_jax.config import RouterConfig
from readme_jax.models import layers, paged, router
from readme_jax.models.paged import Cache, Rows
from readme_jax.serving import segments
from readme_jax.sharding import put

PAGE, WIDTH, HEAD = 4, 40, 8


def scattered(k_BSKH, v_BSKH, seed):
    """(cache, table [B, W]): keys of each row in random pages of a pool of garbage."""
    rng, (b, s, kv, h) = np.random.default_rng(seed), k_BSKH.shape
    table_BW = rng.permutation(b * WIDTH + 5)[: b * WIDTH].reshape(b, WIDTH).astype(np.int32)
    pools = []
    for new_BSKH in (k_BSKH, v_BSKH):
        pool_SJ = rng.normal(size=((b * WIDTH + 6) * PAGE, kv * h)).astype(np.float32) * 50
        slot_BS = table_BW[:, np.arange(s) // PAGE] * PAGE + np.arange(s) % PAGE
        pool_SJ[slot_BS] = new_BSKH.reshape(b, s, kv * h)
        pools.append(put(pool_SJ))
    return Cache(*pools), put(table_BW)


@jax.jit
def run(q, cache, table, positions, window):
    return paged.attention(q, cache, table, positions, window, page=PAGE, scale=0.3)


@pytest.mark.parametrize("window", [None, 0, 5, 70])
@pytest.mark.parametrize(
    "heads, kv, tokens, rows",
    [(4, 4, 1, 5), (6, 2, 1, 5), (3, 1, 1, 5), (4, 2, 9, 5), (16, 16, 1, 5), (4, 2, 1, paged.CPU_ROWS + 3)],
)
def test_attention_over_pages_is_attention(mesh, heads, kv, tokens, rows, window):
    """Rows of different lengths, up to several blocks; each query at its own position."""
    rng, last = np.random.default_rng(kv), np.resize([0, 3, 63, 64, 150], rows)
    b, s = len(last), int(last.max()) + tokens
    q, k, v = (rng.normal(size=(b, n, h, HEAD)).astype(np.float32) for n, h in ((tokens, heads), (s, kv), (s, kv)))
    position_BT = (last[:, None] + np.arange(tokens)).astype(np.int32)
    mask_BTS = layers.cache_mask(put(position_BT), s)
    if window is not None:
        slot_BS = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
        mask_BTS = layers.windowed(mask_BTS, put(position_BT), slot_BS, jnp.int32(window))
    expected = layers.attention(put(q), put(k), put(v), mask_BTS, 0.3)
    cache, table_BW = scattered(k, v, seed=1)
    got = run(put(q), cache, table_BW, put(position_BT), None if window is None else put(np.int32(window)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def test_nothing_to_see_is_zero(mesh):
    cache, table_BW = scattered(*np.ones((2, 2, 3, 2, HEAD), np.float32), seed=2)
    got = run(put(np.ones((2, 1, 4, HEAD), np.float32)), cache, table_BW, put(np.full((2, 1), -1, np.int32)), None)
    assert not np.asarray(got).any()


@pytest.mark.parametrize("rows", [1, 3])
def test_only_named_slots_are_written(mesh, rows):
    cache = Cache(*map(put, [np.zeros((20, 6), np.float32)] * 2))
    new = np.arange(1, 1 + rows * 6, dtype=np.float32).reshape(rows, 1, 2, 3)
    written = jax.jit(paged.write)(cache, put(np.array([[7], [2], [19]][:rows], np.int32)), put(new), put(-new))
    expected = np.zeros((20, 6), np.float32)
    expected[[7, 2, 19][:rows]] = new.reshape(rows, 6)
    np.testing.assert_array_equal(written.k_SJ, expected)
    np.testing.assert_array_equal(written.v_SJ, -expected)


def test_the_paged_router_names_the_experts_of_the_router(mesh):
    """Two layers, a prompt in pieces, then single tokens of two rows at once."""
    cfg, vocab, experts, length = RouterConfig(width=32, heads=2, layers=2), 50, 6, 100
    params = router.place(random_params(router.abstract_params(cfg, vocab, experts), seed=3))
    ids_BT = np.random.default_rng(4).integers(0, vocab, (2, length)).astype(np.int32)
    expected = np.asarray(router.route(cfg, params, put(ids_BT), put(np.ones_like(ids_BT)), 1e4))
    pages = 2 * WIDTH
    cache = Cache(*map(put, [np.full(((2 * pages + 1) * PAGE, 32), 9, np.float32)] * 2))
    table_BW = np.random.default_rng(5).permutation(pages).reshape(2, WIDTH).astype(np.int32)

    @jax.jit
    def step(cache, rows):
        return paged.route(cfg, params, cache, rows, 1e4, page=PAGE)

    def rows(which, start, count, spare=0):
        place_T = np.arange(start, start + count)
        write_BT = np.full((len(which), count + spare), pages * PAGE, np.int32)
        write_BT[:, :count] = table_BW[which][:, place_T // PAGE] * PAGE + place_T % PAGE
        position_T = np.minimum(np.arange(start, start + count + spare), start + count - 1)
        position_BT = np.broadcast_to(position_T, write_BT.shape).astype(np.int32)
        new_BT = np.pad(ids_BT[which, start : start + count], ((0, 0), (0, spare)))
        return Rows(*map(put, (new_BT, position_BT, np.zeros_like(new_BT), write_BT, table_BW[which])))

    got = np.zeros_like(expected)
    for row in (0, 1):
        for start in range(0, 90, 30):
            expert_BT, cache = step(cache, rows([row], start, 30, spare=2))
            got[row, start : start + 30] = expert_BT[0, :30]
    for place in range(90, length):
        expert_BT, cache = step(cache, rows([0, 1], place, 1))
        got[:, place] = expert_BT[:, 0]
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(expected)) > 2


def test_packed_arrays_come_back_bit_for_bit(mesh):
    odd = np.array([-0.0, np.nan, np.inf, 1e-45], np.float32)
    tree = {"a": odd.reshape(2, 2), "b": np.array([2**31, 2**32 - 1], np.uint32), "c": np.int32(-5), "d": odd[:0]}
    told_Z = put(segments.packed(tree))
    got = jax.jit(lambda told_Z: segments.unpacked(told_Z, tree))(told_Z)
    for name, array in tree.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes() and got[name].shape == array.shape, name
    with pytest.raises(AssertionError):
        segments.packed([np.zeros(2, np.int64)])
