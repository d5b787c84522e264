"""The virtual link by hand-made cases; the offline optimum against a search over every schedule; one against the other."""

import functools

import numpy as np
import pytest

from readme_jax.config import ConfigError
from readme_jax.serving.link import Load, Optimum, VirtualLink, batched, hidden_share


def order(link):
    return [(t.load.key, t.start, t.end) for t in link.transfers]


def test_one_transfer_at_a_time_with_its_latency():
    link = VirtualLink(bandwidth=10.0, latency=0.5, keep=True)
    link.issue([Load((0, 0), 10), Load((0, 1), 20)], now=1.0)
    assert link.ready((0, 0), 1.0) == 2.5
    assert link.ready((0, 1), 2.5) == 5.0
    assert order(link) == [((0, 0), 1.0, 2.5), ((0, 1), 2.5, 5.0)]
    assert (link.busy, link.moved, link.count) == (4.0, 30, 2)


def test_earliest_deadline_first_but_never_interrupted():
    link = VirtualLink(bandwidth=1.0, keep=True)
    link.issue([Load((1, 3), 4), Load((1, 1), 2)], now=0.0)
    link.issue([Load((1, 0), 1)], now=1.0)  # (1, 1) is under way until 2, then (1, 0) goes before (1, 3)
    assert link.ready((1, 3), 1.0) == 7.0
    assert order(link) == [((1, 1), 0.0, 2.0), ((1, 0), 2.0, 3.0), ((1, 3), 3.0, 7.0)]


def test_a_load_of_the_same_moment_competes():
    link = VirtualLink(bandwidth=1.0, keep=True)
    link.issue([Load((1, 3), 4)], now=0.0)
    link.issue([Load((1, 1), 2)], now=0.0)
    assert link.ready((1, 1), 0.0) == 2.0


def test_no_slot_is_overwritten_while_a_layer_may_read_it():
    link = VirtualLink(bandwidth=1.0, keep=True)
    link.issue([Load((0, 0), 1)], now=0.0)
    assert link.ready((0, 0), 0.0) == 1.0
    link.issue([Load((1, 0), 2, after=(0, 0)), Load((1, 1), 1, after=(0, 1)), Load((1, 1), 1)], now=1.0)
    link.freed((0, 0), 5.0)
    assert link.ready((0, 1), 5.0) == 5.0
    link.freed((0, 1), 6.0)
    assert link.ready((1, 0), 6.0) == 7.0
    assert link.ready((1, 1), 7.0) == 8.0
    assert [t.released for t in link.transfers] == [0.0, 1.0, 5.0, 6.0]
    assert all(t.start >= t.released for t in link.transfers)


def test_a_load_behind_time_is_an_error():
    link = VirtualLink(bandwidth=1.0)
    link.freed((0, 0), 1.0)
    with pytest.raises(AssertionError):
        link.issue([Load((0, 0), 1)], now=1.0)
    with pytest.raises(AssertionError):
        link.issue([Load((0, 2), 1, after=(0, 2))], now=1.0)
    with pytest.raises(ConfigError, match="bandwidth=0"):
        VirtualLink(bandwidth=0)


def test_neighbours_travel_together_up_to_a_size():
    items, slots = np.arange(7, dtype=np.int32), np.arange(10, 17, dtype=np.int32)
    after = [None, None, (0, 1), (0, 1), (0, 1), None, None]
    loads = batched((1, 0), items, slots, after, page_bytes=8, most=16)
    assert [(load.items.tolist(), load.after, load.size) for load in loads] == [
        ([0, 1], None, 16), ([2, 3], (0, 1), 16), ([4], (0, 1), 8), ([5, 6], None, 16),
    ]  # fmt: skip
    assert np.concatenate([load.slots for load in loads]).tolist() == slots.tolist()
    assert len(batched((1, 0), items, slots, after, page_bytes=8, most=1)) == 7
    assert batched((1, 0), items[:0], slots[:0], [], page_bytes=8, most=16) == []


# ---- the optimum ----------------------------------------------------------------------------------
# A case: steps of layers (compute units, [(after, units), ...]); step t is decided as step t - 1 begins.


def draw(rng, steps=3, layers=2, most=6):
    """A random case of whole numbers with at most `most` loads."""
    case, count = [], 0
    for step in range(steps):
        row = []
        for layer in range(layers):
            loads = []
            while count < most and rng.random() < 0.5:
                before = [(s, i) for s in range(max(0, step - 1), step + 1) for i in range(layers) if (s, i) < (step, layer)]
                before = [None, *before]
                loads.append((before[rng.integers(len(before))], int(rng.integers(1, 4))))
                count += 1
            row.append((int(rng.integers(1, 4)), loads))
        case.append(row)
    return case


def decided(step):
    return 0.0 if step == 0 else (step - 1, 0)


def optimum(case):
    best = Optimum()
    for step, row in enumerate(case):
        best.step(step, decided(step), [c for c, _ in row], [loads for _, loads in row])
    return best


def least_end_of_all_schedules(case):
    """Search: in every unit of time the link gives the unit to any released load, or to none."""
    layers = [(s, i) for s in range(len(case)) for i in range(len(case[0]))]
    loads = [(key, after, n) for key in layers for after, n in case[key[0]][key[1]][1]]

    @functools.cache
    def search(position, running, remaining):
        """Units until the end. position: layer that runs or waits; running: its units left, 0 when it has not begun."""
        if position == len(layers):
            return 0
        key = layers[position]
        begun = bool(running)
        if not begun and all(not n for n, (k, _, _) in zip(remaining, loads) if k == key):
            begun, running = True, case[key[0]][key[1]][0]
        last_begun = position if begun else position - 1
        step_begun = layers[last_begun][0] if last_begun >= 0 else -1
        # a step counts as begun when compute is free for it, even if its first layer waits
        reached = max(step_begun, key[0])
        choices = [
            i
            for i, (k, after, _) in enumerate(loads)
            if remaining[i] and (k[0] - 1 <= reached) and (after is None or layers.index(after) < position)
        ]
        best = None
        for i in [None, *choices]:
            rest = tuple(n - (j == i) for j, n in enumerate(remaining))
            if begun and running == 1:
                value = 1 + search(position + 1, 0, rest)
            elif begun:
                value = 1 + search(position, running - 1, rest)
            elif i is None:
                continue  # idling while compute waits gains nothing, and something is released
            else:
                value = 1 + search(position, 0, rest)
            best = value if best is None else min(best, value)
        assert best is not None
        return best

    return search(0, 0, tuple(n for _, _, n in loads))


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_is_the_best_of_all_schedules(seed):
    case = draw(np.random.default_rng(seed))
    best = optimum(case)
    assert best.end == least_end_of_all_schedules(case)
    assert best.stall == best.end - sum(c for row in case for c, _ in row)


def play(case, latency=0.0, split=1, on_demand=False):
    """The virtual link under the same case: (stall, end, link). Loads go in parts of 1 / split."""
    link, clock, stall = VirtualLink(1.0, latency, keep=True), 0.0, 0.0

    def issue(step, layer, now):
        for after, n in case[step][layer][1]:
            link.issue([Load((step, layer), n / split, after) for _ in range(split)], now)

    for step, row in enumerate(case):
        if not on_demand:
            for ahead in (step, step + 1) if step == 0 else (step + 1,):
                for layer in range(len(row)) if ahead < len(case) else ():
                    issue(ahead, layer, clock)
        for layer, (compute, _) in enumerate(row):
            if on_demand:
                issue(step, layer, clock)
            begin = link.ready((step, layer), clock)
            stall += begin - clock
            clock = begin + compute
            link.freed((step, layer), clock)
    return stall, clock, link


@pytest.mark.parametrize("seed", range(25))
def test_the_link_is_no_better_than_the_optimum_and_near_it(seed):
    case = draw(np.random.default_rng(seed), steps=6, layers=3, most=30)
    best = optimum(case)
    stall, end, link = play(case)
    fine, _, _ = play(case, split=64)
    demand, late, _ = play(case, on_demand=True)
    assert best.stall - 1e-9 <= min(stall, fine) and stall <= demand + 1e-9
    assert fine - best.stall <= 1 / 16  # what is left is that a part is not interrupted
    assert best.end <= end + 1e-9 and end <= late + 1e-9
    assert hidden_share(link.busy, stall, best.stall) <= 1 + 1e-9
    assert link.moved == sum(n for row in case for _, loads in row for _, n in loads)


def test_the_link_never_rests_beside_a_released_load():
    for seed in range(10):
        _, _, link = play(draw(np.random.default_rng(seed), steps=8, layers=3, most=40))
        for i in range(1, len(link.transfers)):
            start, end = link.transfers[i].start, link.transfers[i - 1].end
            assert start >= end
            assert start == end or start == min(t.released for t in link.transfers[i:])


def test_hidden_share_counts_what_could_be_hidden():
    assert hidden_share(10.0, 2.0, 2.0) == 1.0
    assert hidden_share(10.0, 6.0, 2.0) == 0.5
    assert hidden_share(0.0, 0.0, 0.0) == 1.0


def test_the_optimum_forgets():
    best = Optimum()
    for step in range(5000):
        best.step(step, decided(step), [1.0, 1.0], [[(None, 0.5)], [((step - 1, 1) if step else None, 0.25)]])
    assert len(best._gaps) < 50 and len(best._ends) < 2000 and len(best._starts) < 5
