"""Expert pages: every channel in its place once, every expert's pages exactly, pages few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.config import ConfigError
from readme_jax.routing import membership
from readme_jax.serving.bank import Bank


@st.composite
def tables(draw):
    """(table_LEC, mlp) of random experts."""
    layers, experts, mlp = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(2, 24))
    channels = draw(st.integers(1, mlp))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popular_F = rng.random(mlp)  # experts overlap more than by chance
    score_LEF = popular_F + rng.random((layers, experts, mlp)) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    return np.sort(np.argsort(score_LEF, axis=-1)[..., :channels], axis=-1).astype(np.int32), mlp


def apart(layers=2, experts=3, channels=5):
    """Table of separate experts and its F."""
    table_EC = np.arange(experts * channels, dtype=np.int32).reshape(experts, channels)
    return np.broadcast_to(table_EC, (layers, experts, channels)), experts * channels


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 6))
def test_every_channel_has_one_row_and_every_expert_its_pages(made, page):
    table_LEC, mlp = made
    bank = Bank.from_table(table_LEC, mlp, row_bytes=12, page=page)
    assert bank.page_bytes == 12 * page and bank.order_LR.shape == (bank.layers, bank.pages * page)
    member_LEF = membership(table_LEC, mlp)
    for layer, order_R in enumerate(bank.order_LR):
        used = np.flatnonzero(member_LEF[layer].any(0))
        rows = order_R[order_R >= 0]
        assert sorted(rows) == used.tolist() and (order_R[len(rows) :] == -1).all()
        for p, page_R in enumerate(order_R.reshape(-1, page)):
            has_E = member_LEF[layer][:, page_R[page_R >= 0]].any(1)
            assert (bank.touch_LPE[layer, p] == has_E).all()
    assert bank.total == sum(-(-len(np.unique(t)) // page) for t in table_LEC)


@settings(max_examples=60, deadline=None)
@given(tables())
def test_the_order_is_the_greedy_walk(made):
    table_LEC, mlp = made
    bank = Bank.from_table(table_LEC, mlp, row_bytes=1, page=1)
    for layer, member_EF in enumerate(membership(table_LEC, mlp)):
        order = bank.order_LR[layer][bank.order_LR[layer] >= 0]
        walk = []  # patterns in order of first appearance: equal ones must stand together
        for channel in order:
            if not walk or walk[-1] != tuple(member_EF[:, channel]):
                walk.append(tuple(member_EF[:, channel]))
        assert len(walk) == len(set(walk))
        assert sum(walk[0]) == max(map(sum, walk))
        for i in range(len(walk) - 1):
            steps = [sum(a != b for a, b in zip(walk[i], other)) for other in walk[i + 1 :]]
            assert steps[0] == min(steps)


def test_of_equally_near_patterns_the_one_of_most_channels_is_next():
    """After channel 0, which all have, channels 2 and 3 (of experts 0 and 1) and 1 (of 0 and 2) are equally near."""
    table_LEC = np.array([[[0, 1, 2, 3], [0, 2, 3, 6], [0, 1, 4, 5]]])
    assert Bank.from_table(table_LEC, 7, row_bytes=1, page=1).order_LR.tolist() == [[0, 2, 3, 6, 4, 5, 1]]


@settings(max_examples=30, deadline=None)
@given(tables(), st.integers(1, 6), st.integers(0, 2**32 - 1), st.data())
def test_the_pages_of_a_set_compute_what_its_experts_do(made, page, seed, data):
    """Masked FFN over the pages of a set = each expert's own channels, summed: nothing lost, nothing twice."""
    table_LEC, mlp = made
    bank = Bank.from_table(table_LEC, mlp, row_bytes=12, page=page)
    chosen = data.draw(st.frozensets(st.integers(0, bank.experts - 1), min_size=1))
    member_LEF, rng = membership(table_LEC, mlp), np.random.default_rng(seed)
    h_LF = rng.normal(size=(bank.layers, mlp))  # what a channel adds to the output
    for layer, pages in enumerate(bank.need(chosen)):
        rows = bank.order_LR[layer].reshape(-1, page)[pages].reshape(-1)
        rows = rows[rows >= 0]
        for expert in chosen:
            paged = (h_LF[layer, rows] * member_LEF[layer, expert, rows]).sum()
            np.testing.assert_allclose(paged, h_LF[layer, table_LEC[layer, expert]].sum(), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(tables(), st.integers(1, 6), st.data())
def test_needs_are_unions_by_layer(made, page, data):
    bank = Bank.from_table(*made, row_bytes=1, page=page)
    chosen = data.draw(st.frozensets(st.integers(0, bank.experts - 1)))
    found = bank.find(chosen)
    want = [
        (layer, p)
        for layer in range(bank.layers)
        for p in range(bank.pages)
        if any(bank.touch_LPE[layer, p, e] for e in chosen)
    ]
    assert [divmod(int(i), bank.pages) for i in found.items_N] == want
    assert found.items_N.dtype == np.int32 and found.layer_N.tolist() == [layer for layer, _ in want]
    assert bank.need_count(chosen) == len(want)
    need = bank.need(chosen)
    assert [(layer, p) for layer, ids in enumerate(need) for p in ids.tolist()] == want
    assert found.widest == max(map(len, need)) and bank.find(chosen) is found
    assert found.bounds[-1] == len(want) and not found.items_N.flags.writeable


@pytest.mark.parametrize("page", [1, 2, 3, 5, 8])
def test_separate_experts_have_pages_of_their_own(page):
    table_LEC, mlp = apart()
    bank = Bank.from_table(table_LEC, mlp, row_bytes=4, page=page, separate=True)
    each = -(-5 // page)
    assert bank.storage == "separate" and bank.pages == 3 * each and (bank.touch_LPE.sum(2) == 1).all()
    for e in range(3):
        for layer, pages in enumerate(bank.need({e})):
            assert pages.tolist() == list(range(e * each, (e + 1) * each))
            rows = bank.order_LR[layer].reshape(-1, page)[pages].reshape(-1)
            assert rows[rows >= 0].tolist() == table_LEC[layer, e].tolist()
    assert bank.least("layer") == each and bank.least("column") == 2 * each


def test_the_cache_of_needs_is_bounded(monkeypatch):
    monkeypatch.setattr("readme_jax.serving.bank.CACHED_IDS", 5 * 6)
    bank = Bank.synthetic(layers=2, experts=3, channels=4, row_bytes=1)
    for n in range(20):
        bank.find({n % 3, n % 2})
        assert len(bank._needs) <= 5


def test_pages_of_the_default_size():
    assert Bank.from_table(*apart(), row_bytes=1).page == 16
    assert Bank.from_table(np.arange(2048).reshape(1, 2, 1024), 4096, row_bytes=1).page == 32


@pytest.mark.parametrize("overlap", [0.55, 0.69, 0.9])
def test_synthetic_tied_experts_overlap_as_asked(overlap):
    bank = Bank.synthetic(layers=4, experts=7, channels=2000, row_bytes=6, storage="tied", overlap=overlap, page=1)
    has_LPE = bank.touch_LPE.astype(int)
    pairs_LEE = np.einsum("lpe,lpf->lef", has_LPE, has_LPE) / 2000
    assert (np.diagonal(pairs_LEE, axis1=1, axis2=2) == 1).all()
    assert np.mean(pairs_LEE[:, ~np.eye(7, dtype=bool)]) == pytest.approx(overlap, abs=0.02)
    if overlap == 0.69:  # METHOD, section 2: in all experts 37 % of an expert, in any 86 % of F
        assert has_LPE.all(2).sum() / (4 * 2000) == pytest.approx(0.37, abs=0.1)
        assert has_LPE.any(2).sum() / (4 * 4000) == pytest.approx(0.86, abs=0.05)
    again = Bank.synthetic(layers=4, experts=7, channels=2000, row_bytes=6, storage="tied", overlap=overlap, page=1)
    assert (again.order_LR == bank.order_LR).all()


def test_synthetic_separate_experts_are_one_page_each():
    bank = Bank.synthetic(layers=32, experts=7, channels=5504, row_bytes=3 * 4096 * 2)
    assert (bank.items, bank.total, bank.pages) == (224, 224, 7)
    assert bank.page_bytes == 5504 * 3 * 4096 * 2 and bank.total_bytes == 224 * bank.page_bytes
    assert bank.read_ratio == 1


def test_reordered_channels_make_fewer_pages():
    """Seven tied experts at the measured overlap: 16-row pages read little beyond an expert's own channels."""
    bank = Bank.synthetic(layers=2, experts=7, channels=768, row_bytes=1, storage="tied", page=16)
    assert 1 <= bank.read_ratio < 1.25


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Bank.from_table(np.zeros((2, 3), int), 4, row_bytes=1), r"shape \(2, 3\), not \[L, E, C\]"),
        (lambda: Bank.from_table(*apart(), row_bytes=0), "row_bytes=0 must be at least 1"),
        (lambda: Bank.from_table(*apart(), row_bytes=1, page=0), "page=0 must be at least 1 row"),
        (lambda: Bank.from_table(apart()[0], 14, row_bytes=1), r"names channels 0..14, outside 0..13"),
        (lambda: Bank.from_table(np.array([[[1, 1]]]), 4, row_bytes=1), "a channel twice in one expert"),
        (lambda: Bank.from_table(np.array([[[0], [0]]]), 4, row_bytes=1, separate=True), "a channel in two experts"),
        (lambda: Bank.synthetic(layers=0, experts=1, channels=1, row_bytes=1), "layers=0 must be at least 1"),
        (
            lambda: Bank.synthetic(layers=1, experts=2, channels=4, row_bytes=1, storage="tied", overlap=0.5),
            "overlap=0.5 must be above channels / mlp = 0.5 and below 1",
        ),
        (
            lambda: Bank.synthetic(layers=1, experts=2, channels=4, row_bytes=1, storage="tied", mlp=4),
            "channels=4 must be below mlp=4",
        ),
        (lambda: Bank.synthetic(layers=1, experts=2, channels=4, row_bytes=1, storage="own"), "storage='own'"),  # pyright: ignore
        (
            lambda: Bank.synthetic(layers=1, experts=2, channels=4, row_bytes=1).find({2}),
            r"experts=\[2\] must be in 0..1",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, message):
    with pytest.raises(ConfigError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_budget_below_the_least_says_the_least():
    bank = Bank.synthetic(layers=2, experts=3, channels=4, row_bytes=10)
    assert bank.slots(40) == 1 and bank.slots(99) == 2 and bank.slots(10**9) == 6
    with pytest.raises(ConfigError, match=r"expert_memory=39 bytes .* in a layer.*at least 40 bytes \(1 pages of 40\)"):
        bank.slots(39)
    assert bank.slots(80, "column") == 2
    with pytest.raises(ConfigError, match=r"expert_memory=79 bytes .* in all layers.*at least 80 bytes"):
        bank.slots(79, "column")
