"""The virtual link by hand-made cases; the offline optimum against a search of all schedules."""

import functools

import numpy as np
import pytest

from readme_jax.config import ConfigError
from readme_jax.serving.link import FREE, Load, Optimum, VirtualLink, batched, hidden_share


def order(link):
    return [(t.load.due, t.start, t.end) for t in link.transfers]


def test_one_transfer_at_a_time_with_its_latency():
    link = VirtualLink(bandwidth=10.0, latency=0.5, keep=True)
    link.issue([Load(0, 10), Load(1, 20)], now=1.0)
    assert link.ready(0, 1.0) == 2.5
    assert link.ready(1, 2.5) == 5.0
    assert order(link) == [(0, 1.0, 2.5), (1, 2.5, 5.0)]
    assert (link.busy, link.moved, link.count) == (4.0, 30, 2)


def test_earliest_deadline_first_but_never_interrupted():
    link = VirtualLink(bandwidth=1.0, keep=True)
    link.issue([Load(7, 4), Load(5, 2)], now=0.0)
    link.issue([Load(4, 1)], now=1.0)  # 5 is under way until 2, then 4 goes before 7
    assert link.ready(7, 1.0) == 7.0
    assert order(link) == [(5, 0.0, 2.0), (4, 2.0, 3.0), (7, 3.0, 7.0)]


def test_a_load_of_the_same_moment_competes():
    link = VirtualLink(bandwidth=1.0, keep=True)
    link.issue([Load(7, 4)], now=0.0)
    link.issue([Load(5, 2)], now=0.0)
    assert link.ready(5, 0.0) == 2.0


def test_no_slot_is_overwritten_while_a_pass_may_read_it():
    link = VirtualLink(bandwidth=1.0, keep=True)
    link.issue([Load(0, 1)], now=0.0)
    assert link.ready(0, 0.0) == 1.0
    link.issue([Load(4, 2, after=0), Load(5, 1, after=1), Load(5, 1)], now=1.0)
    link.freed(0, 5.0)
    assert link.ready(1, 5.0) == 5.0
    link.freed(1, 6.0)
    assert link.ready(4, 6.0) == 7.0
    assert link.ready(5, 7.0) == 8.0
    assert [t.released for t in link.transfers] == [0.0, 1.0, 5.0, 6.0]
    assert all(t.start >= t.released for t in link.transfers)


def test_a_load_behind_time_is_an_error():
    link = VirtualLink(bandwidth=1.0)
    link.freed(0, 1.0)
    with pytest.raises(AssertionError):
        link.issue([Load(0, 1)], now=1.0)
    with pytest.raises(AssertionError):
        link.issue([Load(2, 1, after=2)], now=1.0)
    with pytest.raises(ConfigError, match="bandwidth=0"):
        VirtualLink(bandwidth=0)


def test_an_earlier_deadline_goes_between_two_parts():
    link = VirtualLink(bandwidth=1.0, latency=0.5, part=2, keep=True)
    link.issue([Load(7, 5)], now=0.0)
    link.issue([Load(4, 3)], now=3.0)  # the part that is under way ends at 4.5
    assert link.ready(4, 3.0) == 8.0
    assert link.ready(7, 8.0) == 9.5  # one unit is left, with a latency of its own
    assert [(t.load.due, t.start, t.end, t.size) for t in link.transfers] == [
        (7, 0.0, 4.5, 4), (4, 4.5, 8.0, 3), (7, 8.0, 9.5, 1),
    ]  # fmt: skip
    assert link.moved == 8 and link.busy == 9.5


def test_going_on_with_a_load_costs_no_latency():
    link = VirtualLink(bandwidth=1.0, latency=0.5, part=2)
    link.issue([Load(1, 6)], now=0.0)
    for now in (1.0, 2.5, 3.0):
        link.issue([Load(2, 1)], now)
    assert link.ready(1, 3.0) == 6.5
    assert link.ready(2, 6.5) == 11.0


def test_neighbours_travel_together():
    items, slots = np.arange(7, dtype=np.int32), np.arange(10, 17, dtype=np.int32)
    after = np.array([FREE, FREE, 1, 1, 1, FREE, FREE])
    loads = batched(4, items, slots, after, 8)
    assert [(load.items.tolist(), load.after, load.size, load.due) for load in loads] == [
        ([0, 1], FREE, 16, 4), ([2, 3, 4], 1, 24, 4), ([5, 6], FREE, 16, 4),
    ]  # fmt: skip
    assert np.concatenate([load.slots for load in loads]).tolist() == slots.tolist()
    assert batched(4, items[:0], slots[:0], after[:0], 8) == []


# ---- the optimum ----------------------------------------------------------------------------------
# A case: steps of passes (compute units, [(after, units), ...]); step t is decided as step t - 1 begins.


def draw(rng, steps=3, layers=2, most=6):
    """A random case of whole numbers with at most `most` loads."""
    case, count = [], 0
    for step in range(steps):
        row = []
        for layer in range(layers):
            loads, number = [], step * layers + layer
            while count < most and rng.random() < 0.5:
                before = [FREE, *range(max(0, step - 1) * layers, number)]
                loads.append((before[rng.integers(len(before))], int(rng.integers(1, 4))))
                count += 1
            row.append((int(rng.integers(1, 4)), loads))
        case.append(row)
    return case


def optimum(case):
    best, layers = Optimum(), len(case[0])
    for step, row in enumerate(case):
        decided = (step - 1) * layers if step else 0.0
        best.step(step * layers, decided, [compute for compute, _ in row], [loads for _, loads in row])
    return best


def least_end_of_all_schedules(case):
    """Search: in every unit of time the link gives the unit to any released load."""
    layers = len(case[0])
    passes = [each for row in case for each in row]
    loads = [(due, after, n) for due, (_, wanted) in enumerate(passes) for after, n in wanted]

    @functools.cache
    def search(at, left, remaining):
        """Units until the end. at: pass that runs or waits; left: its units, 0 when it has not begun."""
        if at == len(passes):
            return 0
        if not left and all(not n for n, (due, _, _) in zip(remaining, loads) if due == at):
            left = passes[at][0]
        released = [
            i
            for i, (due, after, _) in enumerate(loads)
            if remaining[i] and due // layers - 1 <= at // layers and after < at
        ]
        values = []
        for i in [None, *released] if left else released:  # to rest while compute waits gains nothing
            rest = tuple(n - (j == i) for j, n in enumerate(remaining))
            values.append(1 + (search(at + 1, 0, rest) if left == 1 else search(at, max(left - 1, 0), rest)))
        return min(values)

    return search(0, 0, tuple(n for _, _, n in loads))


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_is_the_best_of_all_schedules(seed):
    case = draw(np.random.default_rng(seed))
    best = optimum(case)
    assert best.end == least_end_of_all_schedules(case)
    assert best.stall == best.end - sum(compute for row in case for compute, _ in row)


def play(case, part=256, on_demand=False):
    """The virtual link under the same case, 64 bytes a unit, in parts of `part` bytes: (stall, end, link)."""
    link, clock, stall, layers = VirtualLink(64.0, part=part, keep=True), 0.0, 0.0, len(case[0])

    def issue(step, layer, now):
        for after, n in case[step][layer][1]:
            link.issue([Load(step * layers + layer, 64 * n, after)], now)

    for step, row in enumerate(case):
        if not on_demand:
            for ahead in range(step + (step > 0), min(step + 2, len(case))):
                for layer in range(layers):
                    issue(ahead, layer, clock)
        for layer, (compute, _) in enumerate(row):
            if on_demand:
                issue(step, layer, clock)
            begin = link.ready(step * layers + layer, clock)
            stall += begin - clock
            clock = begin + compute
            link.freed(step * layers + layer, clock)
    return stall, clock, link


@pytest.mark.parametrize("seed", range(25))
def test_the_link_is_no_better_than_the_optimum_and_near_it(seed):
    case = draw(np.random.default_rng(seed), steps=6, layers=3, most=30)
    best = optimum(case)
    stall, end, link = play(case)
    fine, _, _ = play(case, part=1)
    demand, late, _ = play(case, on_demand=True)
    assert best.stall - 1e-9 <= min(stall, fine) and stall <= demand + 1e-9
    assert fine - best.stall <= 1 / 16  # what is left is that a part is not interrupted
    assert best.end <= end + 1e-9 and end <= late + 1e-9
    assert hidden_share(link.busy, stall, best.stall) <= 1 + 1e-9
    assert link.moved == 64 * sum(n for row in case for _, loads in row for _, n in loads)


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
    for step in range(20_000):
        best.step(2 * step, 2 * step - 2 if step else 0.0, [1.0, 1.0], [[(FREE, 0.5)], [(2 * step - 1, 0.25)]])
    assert best.stall == 0.5
    assert len(best._gaps) < 50 and len(best._ends) < 5000 and len(best._begins) < 5000
