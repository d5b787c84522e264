"""Properties of the host-made routing plans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.config import ConfigError
from readme_jax.routing import (
    PREPARED,
    RUNGS,
    block_rows,
    bucket,
    exchange,
    exchange_shapes,
    group,
    group_counts,
    group_rows,
    ladder,
    largest_pair,
    likely,
)
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


def taken(x_NZ, row_Q):
    """x[row], 0 where the row is N: as the device does."""
    return np.concatenate([x_NZ, np.zeros_like(x_NZ[:1])])[row_Q]


def swapped(rows_GXSZ, peers):
    """The all-to-all among the peers of each data shard: block x of peer i goes to block i of peer x."""
    whole = rows_GXSZ.reshape(-1, peers, peers, *rows_GXSZ.shape[2:])
    return whole.swapaxes(1, 2).reshape(rows_GXSZ.shape)


@settings(max_examples=200, deadline=None)
@given(
    local=st.integers(1, 4),
    data=st.sampled_from([1, 2, 3]),
    peers=st.sampled_from([1, 2, 4, 8]),
    micro=st.integers(1, 3),
    length=st.integers(1, 30),
    skew=st.floats(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_reaches_its_expert_and_comes_back(local, data, peers, micro, length, skew, seed):
    experts, devices, rng = local * peers, data * peers, np.random.default_rng(seed)
    share = rng.permutation((1.0 + np.arange(experts)) ** -skew) * (rng.random(experts) < 0.8) + 1e-9  # some have none
    expert_ABT = rng.choice(experts, (micro, devices * 2, length), p=share / share.sum()).astype(np.int32)
    plan = exchange(expert_ABT, experts, data=data, peers=peers)
    size = plan.send_AGXS.shape[-1]
    assert all(a is None or a.dtype == np.int32 for a in plan)
    shapes = exchange_shapes(expert_ABT.shape, experts, data=data, peers=peers, rows=size)
    assert shapes == tuple(None if a is None else a.shape for a in plan)
    assert (plan.group_AGPR is None) == (local == 1)
    # what travels with a token: 1 + its number in the microbatch, 1 + its expert; 0 is an empty row
    tokens = 2 * length
    for a in range(micro):
        expert_GM = expert_ABT[a].reshape(devices, tokens)
        mark_GM2 = np.stack([np.arange(devices * tokens).reshape(devices, tokens), expert_GM], -1) + 1
        sent = np.stack([taken(mark, rows) for mark, rows in zip(mark_GM2, plan.send_AGXS[a])])
        pairs = np.stack([np.bincount(e // local, minlength=peers) for e in expert_GM])
        rungs = ladder(tokens, peers)
        if a == 0:
            most = max(
                np.bincount(e // local, minlength=peers).max() for e in expert_ABT.reshape(micro * devices, tokens)
            )
            assert size == min(rung for rung in rungs if rung >= most), "the smallest rung that holds them all"
        assert ((sent[..., 0] > 0).sum(-1) == pairs).all(), "no token dropped, none twice"
        received = swapped(sent, peers)
        expert_QG = received[..., 1].reshape(devices, -1)
        here = (expert_QG - 1) // local == np.arange(devices)[:, None] % peers
        assert here[expert_QG > 0].all(), "a row reaches the device of its expert"
        result = received.reshape(devices, peers * size, 2)
        if local > 1:
            blocks = np.stack([taken(r, rows) for r, rows in zip(result, plan.group_AGPR[a])])  # [G, P, R, 2]
            owner = [np.repeat(np.arange(local), n) for n in plan.blocks_AGE[a]]
            for g in range(devices):
                used = len(owner[g])
                first = g % peers * local
                expert_PR = blocks[g, :used, :, 1]
                own = expert_PR == first + owner[g][:, None] + 1
                assert (own | (expert_PR == 0)).all() and (blocks[g, used:] == 0).all()
            flat = blocks.reshape(devices, -1, 2)
            result = np.stack([taken(r, rows.reshape(-1)) for r, rows in zip(flat, plan.ungroup_AGXS[a])])
        back = swapped(result.reshape(devices, peers, size, 2), peers).reshape(devices, -1, 2)
        place_GM = plan.place_ABT[a].reshape(devices, tokens)
        assert (np.stack([r[rows] for r, rows in zip(back, place_GM)]) == mark_GM2).all()


@settings(max_examples=60, deadline=None)
@given(
    local=st.integers(1, 3), peers=st.integers(1, 4), data=st.integers(1, 2), length=st.integers(1, 9),
    share=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_tokens_that_are_not_there_go_nowhere(local, peers, data, length, share, seed):
    """The others are planned as a batch of theirs alone: each arrives in a row of its expert, and comes back."""
    rng, experts = np.random.default_rng(seed), local * peers
    expert_ABT = rng.integers(0, experts, (1, data * peers, length)).astype(np.int32)
    real_ABT = rng.random(expert_ABT.shape) < share
    plan = exchange(expert_ABT, experts, data=data, peers=peers, compiled=(2, length), real_ABT=real_ABT)
    send_GXS, place_GT = plan.send_AGXS[0], plan.place_ABT[0]
    for g, (expert_T, real_T) in enumerate(zip(expert_ABT[0], real_ABT[0])):
        sent_Q, peer_Q = send_GXS[g].ravel(), np.repeat(np.arange(peers), send_GXS.shape[-1])
        going_Q = sent_Q < length
        assert sorted(sent_Q[going_Q]) == np.flatnonzero(real_T).tolist() and (sent_Q[~going_Q] == length).all()
        assert (peer_Q[going_Q] == expert_T[sent_Q[going_Q]] // local).all()
        assert (place_GT[g][~real_T] == len(sent_Q)).all()
        assert (sent_Q[place_GT[g][real_T]] == np.flatnonzero(real_T)).all()
    if local > 1:
        source_GW = plan.group_AGPR[0].reshape(len(send_GXS), -1)
        rows = len(send_GXS[0].ravel())
        assert (source_GW < rows).sum() == real_ABT.sum() == (plan.ungroup_AGXS < source_GW.shape[1]).sum()
        if real_ABT.all():
            alone = exchange(expert_ABT, experts, data=data, peers=peers, compiled=(2, length))
            assert all((a == b).all() for a, b in zip(plan, alone))


def test_more_experts_than_fit_a_byte():
    expert_ABT = np.random.default_rng(0).integers(0, 600, (1, 4, 50)).astype(np.int32)
    plan = exchange(expert_ABT, 600, peers=4)
    tokens = plan.send_AGXS[0]
    for g in range(4):
        for x in range(4):
            got = expert_ABT[0, g][tokens[g, x][tokens[g, x] < 50]]
            assert (got // 150 == x).all() and (np.diff(got) >= 0).all(), "sorted by expert"


@given(tokens=st.integers(1, 10**6), peers=st.sampled_from([1, 2, 4, 8, 16, 64]), most=st.floats(0, 1))
def test_a_ladder_holds_any_skew_on_few_rungs(tokens, peers, most):
    rungs = ladder(tokens, peers)
    assert 1 <= len(rungs) <= RUNGS and list(rungs) == sorted(set(rungs))
    assert rungs[-1] == tokens, "all tokens of a device to one expert"
    mean = tokens / peers
    need = mean + most * (3 * mean - mean)
    size = next((rung for rung in rungs if rung >= need), tokens)
    assert size <= 1.11 * need + 4 or size <= mean + 2 * mean**0.5 + 4, "up to three times the mean, 11 % at most"


def test_rungs_lie_close_where_a_balanced_router_lands():
    rng, rungs = np.random.default_rng(0), ladder(512, 8)
    most = rng.multinomial(512, np.ones(8) / 8, (1000, 8)).max((1, 2))
    size = np.array([next(rung for rung in rungs if rung >= m) for m in most])
    assert np.mean(size / most) < 1.015


@given(rows=st.integers(1, 10**5), local=st.integers(1, 64))
def test_blocks_waste_little(rows, local):
    r = block_rows(rows, local)
    assert r % 8 == 0 and 8 <= r <= 512 and r <= rows / (8 * local) + 8


def test_a_rung_can_be_asked_for():
    expert_ABT = np.zeros((1, 8, 16), np.int32)
    expert_ABT[..., ::2] = np.arange(8)
    sizes = [exchange(expert_ABT, 8, peers=8, rows=rows).send_AGXS.shape[-1] for rows in (None, 3, 12, 16)]
    assert sizes == [10, 10, 12, 16], "never below what the batch needs"


def test_exchange_refuses_what_it_cannot_plan():
    ids = np.zeros((1, 4, 6), np.int32)
    with pytest.raises(ConfigError, match="experts=6 must be a multiple of the mesh's expert=4"):
        exchange(ids, 6, peers=4)
    with pytest.raises(ConfigError, match="batch=4 must be a multiple of the mesh's 8 batch devices"):
        exchange(ids, 8, data=2, peers=4)
    for bad in (-1, 8):
        with pytest.raises(ConfigError, match=r"must lie in 0\.\.7"):
            exchange(ids + bad, 8, peers=4)


# ---- what is compiled ahead ---------------------------------------------------------------------


def test_the_largest_pair_is_what_a_plan_must_hold():
    rng = np.random.default_rng(3)
    for experts, data, peers in ((8, 2, 4), (4, 1, 4), (6, 4, 1), (6, 2, 3)):
        expert_ABT = rng.integers(0, experts, (2, data * peers, 40)).astype(np.int32) ** 2 % experts
        need = largest_pair(expert_ABT, experts, data=data, peers=peers)
        send = exchange(expert_ABT, experts, data=data, peers=peers).send_AGXS
        assert need == (send < 40).sum(-1).max(), (experts, data, peers)


def test_likely_sizes_are_rungs_around_what_was_seen():
    sizes = ladder(512, 8)
    at = sizes.index
    assert likely([sizes[3], sizes[3] - 1, sizes[4]], 512, 8) == sizes[3:8], "three more than seen"
    assert likely([1], 512, 8) == sizes[:4] and likely([512], 512, 8) == (512,)
    assert likely([7], 64, 1) == ladder(64, 1) == (64,)
    wide = likely([1, 512], 512, 8)
    assert len(wide) == PREPARED and wide[0] == sizes[0] and wide[-1] == 512
    gaps = np.diff([at(size) for size in wide])
    assert gaps.max() - gaps.min() <= 1, "evenly"


@pytest.mark.parametrize("mixture", [None, 8.0, 1.0], ids=["even", "unlike documents", "one-sided documents"])
def test_the_first_batches_foretell_a_thousand(mixture):
    """What is compiled for them suffices, and costs few rows more than a program for every rung would."""
    rng, needs = np.random.default_rng(0), []
    for _ in range(64 + 1000):
        share_BE = rng.dirichlet(np.full(16, mixture), 8) if mixture else np.full((8, 16), 1 / 16)
        count_BE = np.stack([rng.multinomial(512, share_E) for share_E in share_BE])
        needs.append(int(count_BE.reshape(8, 8, 2).sum(-1).max()))  # two experts a peer
    ahead, sizes = likely(needs[:64], 512, 8), ladder(512, 8)
    assert max(needs) <= ahead[-1] and len(ahead) <= PREPARED
    taken, own = ([min(s for s in some if s >= need) for need in needs[64:]] for some in (ahead, sizes))
    assert np.mean(taken) / np.mean(own) < 1.02


def test_a_plan_takes_what_is_compiled():
    rng = np.random.default_rng(4)
    expert_ABT = rng.integers(0, 8, (1, 8, 64)).astype(np.int32)
    need = largest_pair(expert_ABT, 8, data=1, peers=8)
    own = exchange(expert_ABT, 8, peers=8).send_AGXS.shape[-1]
    for compiled, size in (((), own), ((need - 1,), own), ((need - 1, 40, 50), 40), ((64,), 64)):
        plan = exchange(expert_ABT, 8, peers=8, compiled=compiled)
        assert plan.send_AGXS.shape[-1] == size
        assert sorted(plan.send_AGXS[0, 0][plan.send_AGXS[0, 0] < 64]) == list(range(64)), "nothing is dropped"


def test_all_numbers_of_groups_are_known():
    rng = np.random.default_rng(5)
    for tokens, experts in ((64, 3), (500, 7), (4096, 8)):
        rows = group_rows(tokens, experts)
        counts, seen = group_counts(tokens, experts, rows), set()
        for _ in range(300):
            share_E = rng.dirichlet(np.full(experts, rng.choice([0.05, 1.0, 100.0])))
            expert_M = rng.choice(experts, tokens, p=share_E).astype(np.int32)
            seen.add(len(group(expert_M, experts, rows)[1]))
        worst_E = np.full(experts - 1, 1)  # all but one leave a group with one row
        for expert_M in (np.zeros(tokens, np.int32), np.repeat(np.arange(experts), [*worst_E, tokens - experts + 1])):
            seen.add(len(group(expert_M.astype(np.int32), experts, rows)[1]))
        assert seen <= set(counts) and counts[0] in seen and len(counts) <= 6
