"""The router against NumPy; packed documents; decoding through the cache against the full forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import router_logits
from oracles_core import packed, random_params

from readme_jax.config import ConfigError, RouterConfig
from readme_jax.models import router
from readme_jax.sharding import put

CFG = RouterConfig(width=32, heads=4, layers=2)
VOCAB, EXPERTS, THETA = 64, 4, 10000.0

_logits = jax.jit(lambda p, ids, segments: router.logits(CFG, p, ids, segments, THETA))
_step = jax.jit(lambda p, ids, positions, cache: router.step(CFG, p, ids, positions, cache, THETA))


@pytest.fixture(scope="module")
def host_params():
    return random_params(router.abstract_params(CFG, VOCAB, EXPERTS), seed=3)


@pytest.fixture
def params(mesh, host_params):
    return jax.tree.map(put, host_params)


def test_logits_match_numpy(params, host_params):
    ids, segments = packed([[200], [200]], 200, VOCAB)
    got = _logits(params, ids, segments)
    assert got.dtype == jnp.float32
    expected = router_logits(host_params, ids, CFG.heads, THETA, CFG.norm_eps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    experts = jax.jit(lambda p: router.route(CFG, p, ids, segments, THETA))(params)
    np.testing.assert_array_equal(experts, expected.argmax(-1))
    assert experts.dtype == jnp.int32 and len(np.unique(experts)) == EXPERTS, "a test on one expert shows nothing"


def test_packed_documents_are_routed_as_if_alone(params, host_params):
    lengths = [[20, 30, 31], [70]]
    ids, segments = packed(lengths, 200, VOCAB, seed=1)
    got = _logits(params, ids, segments)
    for row in range(2):
        start = 0
        for length in lengths[row]:
            alone = router_logits(host_params, ids[row, start : start + length][None], CFG.heads, THETA, CFG.norm_eps)
            np.testing.assert_allclose(got[row, start : start + length], alone[0], rtol=1e-4, atol=1e-4)
            start += length


def test_decoding_one_token_at_a_time_gives_the_same_experts(params):
    ids, segments = packed([[200], [200]], 200, VOCAB, seed=2)
    expected = np.asarray(jnp.argmax(_logits(params, ids, segments), -1))
    cache = router.init_cache(CFG, 2, 200)
    got = []
    for t in range(200):
        expert, cache = _step(params, ids[:, t : t + 1], np.full((2, 1), t, np.int32), cache)
        got.append(expert)
    np.testing.assert_array_equal(np.concatenate(got, 1), expected)


def test_prefill_of_padded_rows_then_decode(params):
    """Rows of 30 and 50 tokens padded on the right to 50, then 20 more each: as the full forward of each row."""
    ids, segments = packed([[200], [200]], 200, VOCAB, seed=4)
    expected = np.asarray(jnp.argmax(_logits(params, ids, segments), -1))
    prompt = np.array([30, 50])
    first = ids[:, :50].copy()
    first[0, 30:] = 7  # padding, its slots are overwritten before anyone sees them
    got, cache = _step(params, first, np.tile(np.arange(50, dtype=np.int32), (2, 1)), router.init_cache(CFG, 2, 200))
    for row in range(2):
        np.testing.assert_array_equal(got[row, : prompt[row]], expected[row, : prompt[row]])
    for step in range(20):
        at = (prompt + step)[:, None].astype(np.int32)
        got, cache = _step(params, np.take_along_axis(ids, at, 1), at, cache)
        np.testing.assert_array_equal(got, np.take_along_axis(expected, at, 1))


def test_init_takes_the_llms_first_columns_and_routes_nowhere():
    embedding = np.random.default_rng(0).normal(size=(VOCAB, 48)).astype(np.float32)
    params = router.init_params(CFG, embedding, EXPERTS, seed=0)
    np.testing.assert_array_equal(params["embedding"], embedding[:, :32])
    wide = router.init_params(RouterConfig(width=64), embedding, EXPERTS, seed=0)
    np.testing.assert_array_equal(wide["embedding"], np.concatenate([embedding, embedding[:, :16]], 1))
    abstract = router.abstract_params(CFG, VOCAB, EXPERTS)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda a: a.shape, abstract)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    assert not params["head"].any() and not params["b_head"].any()
    again = router.init_params(CFG, embedding, EXPERTS, seed=1)
    assert (again["layers"]["w_q"] != params["layers"]["w_q"]).any(), "the seed matters"


def test_config_refuses_a_width_that_does_not_split():
    with pytest.raises(ConfigError, match="width=30"):
        RouterConfig(width=30, heads=4)
