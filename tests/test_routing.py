"""Properties of the host-made routing plans."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.routing import bucket, group
from readme_jax.steps import plan


@settings(max_examples=200, deadline=None)
@given(
    experts=st.integers(1, 8),
    rows=st.sampled_from([1, 3, 16, 32]),
    data=st.data(),
)
def test_every_token_lies_once_in_a_group_of_its_expert(experts, rows, data):
    # few distinct experts at a time: empty experts and one-expert batches come up often
    pool = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts))
    expert_M = np.array(data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=200)), np.int32)
    source_PR, expert_P, row_M = group(expert_M, experts, rows)
    m = len(expert_M)
    assert source_PR.shape == (len(expert_P), rows)
    assert source_PR.dtype == expert_P.dtype == row_M.dtype == np.int32
    real = source_PR < m
    assert (source_PR[~real] == m).all(), "an empty row names token M, the zero row"
    assert sorted(source_PR[real]) == list(range(m)), "every token once"
    assert (source_PR.reshape(-1)[row_M] == np.arange(m)).all(), "row_M inverts source_PR"
    owner_PR = np.broadcast_to(expert_P[:, None], source_PR.shape)
    assert (owner_PR[real] == expert_M[source_PR[real]]).all(), "a group's rows belong to its expert"
    used = sum(-(-int(n) // rows) for n in np.bincount(expert_M))
    assert used <= len(expert_P) <= max(used * 1.25, 8), "groups used, rounded up to the ladder"


@given(value=st.integers(0, 10**6), more=st.integers(0, 1000), step=st.integers(1, 64))
def test_ladder_never_shrinks_and_wastes_little(value, more, step):
    size = bucket(value, step)
    assert size >= value and size >= step and size % step == 0
    assert size <= bucket(value + more, step)
    assert bucket(size, step) == size, "a rung is its own bucket"
    assert size < max(value * 1.25, value + step) + step


def test_ladder_has_few_rungs():
    sizes = {bucket(value, 1) for value in range(1, 4097)}
    assert len(sizes) <= 8 + 4 * 10  # 4096 = 2^12: four rungs to each power of two above 8


def test_plan_of_microbatches_has_one_shape_and_keeps_every_token():
    rng = np.random.default_rng(0)
    mixed = rng.integers(0, 4, (2, 64))
    expert_ABT = np.stack([mixed, np.zeros_like(mixed), mixed % 2]).astype(np.int32)  # they need 5, 4 and 5 groups
    route = plan(expert_ABT, 4, "grouped", put=np.asarray)
    for a in range(3):
        flat_M = expert_ABT[a].reshape(-1)
        assert (route.source_PR[a].reshape(-1)[route.row_M[a]] == np.arange(128)).all()
        rows = route.source_PR.shape[2]
        assert (route.expert_P[a][route.row_M[a] // rows] == flat_M).all()
        assert np.sum(route.source_PR[a] < 128) == 128
    np.testing.assert_array_equal(plan(expert_ABT, 4, "masked", put=np.asarray).expert_BT, expert_ABT)
