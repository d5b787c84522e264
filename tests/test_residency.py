"""Residency: every plan replayed on a toy device, Belady's rule against exhaustive search, policies against oracles."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from readme_jax.config import ConfigError
from readme_jax.serving.bank import Bank
from readme_jax.serving.optimum import fewest_loads
from readme_jax.serving.residency import MODES, POLICIES, Residency


def tied(seed, layers=3, experts=4, mlp=20, channels=8, page=2):
    rng = np.random.default_rng(seed)
    score_LEF = rng.random(mlp) + rng.random((layers, experts, mlp))
    table_LEC = np.sort(np.argsort(score_LEF, axis=-1)[..., :channels], axis=-1)
    return Bank.from_table(table_LEC, mlp, row_bytes=3, page=page)


def separate(layers=3, experts=4, pages=1):
    return Bank.synthetic(layers=layers, experts=experts, channels=4 * pages, row_bytes=3, page=4)


def chain(steps, experts, stay, batch=1, seed=0):
    """Expert sets of `steps` steps: each of `batch` tokens keeps its expert with probability `stay`."""
    rng = np.random.default_rng(seed)
    now, found = rng.integers(experts, size=batch), []
    for _ in range(steps):
        now = np.where(rng.random(batch) < stay, now, rng.integers(experts, size=batch))
        found.append(frozenset(now.tolist()))
    return found


class Device:
    """What a pool holds when loads are carried out one by one; every rule of a plan is checked on the way."""

    def __init__(self, residency):
        self.residency, self.bank = residency, residency.bank
        self.holds = [-1] * residency.slots
        self.last_read = {}  # item -> pass, over all steps
        self.passes = self.loads = self.hits = self.steps = 0

    def run(self, plan, experts, column=False):
        bank, where = self.bank, {item: slot for slot, item in enumerate(self.holds) if item >= 0}
        assert (plan.step, plan.first_pass) == (self.steps, self.passes)
        reads = [set() for _ in range(bank.layers)]
        all_reads = set(plan.items.tolist())
        assert list(plan.layers) == sorted(plan.layers) and len(plan.read) == len(plan.load) == plan.passes + 1
        assert plan.read[-1] == len(plan.items) and plan.load[-1] == plan.loads
        for n, layer in enumerate(plan.layers):
            items, slots = (x.tolist() for x in plan.reads_of(n))
            needed = set(items)
            for item, slot, victim, free_at in zip(*(x.tolist() for x in plan.loads_of(n))):
                assert item in needed and item not in where, "a load nobody asked for, or a second one"
                assert self.holds[slot] == victim
                if victim >= 0:
                    assert victim not in (all_reads if column else needed), "evicted while in use"
                    assert free_at == self.last_read[victim]
                    del where[victim]
                else:
                    assert free_at == -1
                self.holds[slot], where[item] = item, slot
                self.loads += 1
            assert len(where) <= self.residency.slots
            assert [where[item] for item in items] == slots
            assert not reads[layer] & needed, "two waves read one page"
            assert {item // bank.pages for item in items} <= {layer}
            reads[layer] |= needed
            self.last_read.update(dict.fromkeys(items, self.passes + n))
        assert [sorted(r) for r in reads] == [
            (ids + layer * bank.pages).tolist() for layer, ids in enumerate(bank.need(experts))
        ]
        self.passes += plan.passes
        self.steps += 1
        self.hits += len(plan.items) - plan.loads
        slot_of = np.full(bank.items, -1)
        slot_of[list(where)] = list(where.values())
        assert (self.residency.slot_of == slot_of).all() and self.residency.item_of.tolist() == self.holds
        counters = self.residency.counters
        assert (counters.steps, counters.passes, counters.loads) == (self.steps, self.passes, self.loads)
        assert counters.pages_read == self.hits + self.loads
        assert counters.bytes_loaded == self.loads * bank.page_bytes
        assert counters.evictions == self.loads - len(where)
        assert counters.waves == self.passes - self.steps * bank.layers


def replay(residency, trace, visible=10**9):
    """Loads of a trace, every plan checked."""
    device = Device(residency)
    for t, experts in enumerate(trace):
        device.run(residency.plan(experts, trace[t + 1 : t + 1 + visible]), experts)
    return residency.counters.loads


# ---- random sequences of steps -----------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Any steps with any announced future, true or not, on any pool."""

    @initialize(
        seed=st.integers(0, 9), kind=st.sampled_from(["tied", "apart"]), policy=st.sampled_from(POLICIES),
        mode=st.sampled_from(MODES), share=st.floats(0, 1.1),
    )  # fmt: skip
    def start(self, seed, kind, policy, mode, share):
        bank = tied(seed) if kind == "tied" else separate(pages=1 + seed % 3)
        slots = max(bank.least(mode), int(share * bank.total))
        self.residency = Residency(bank, slots * bank.page_bytes, policy=policy, mode=mode, seed=seed)
        self.device = Device(self.residency)

    @rule(
        experts=st.frozensets(st.integers(0, 3), min_size=1),
        future=st.lists(st.frozensets(st.integers(0, 3), min_size=1), max_size=6),
    )
    def step(self, experts, future):
        missing = self.residency.missing(experts)
        assert missing == np.count_nonzero(self.residency.slot_of[self.residency.bank.find(experts).items_N] < 0)
        assert self.residency.missing_bytes(experts) == missing * self.residency.bank.page_bytes
        plan = self.residency.plan(experts, future)
        fits = self.residency.bank.need_count(experts) <= self.residency.slots
        assert plan.loads == missing if fits and self.residency.policy == "lookahead" else plan.loads >= missing
        self.device.run(plan, experts, column=self.residency.mode == "column" and fits)

    @invariant()
    def nothing_beyond_the_budget(self):
        if hasattr(self, "residency"):
            assert np.count_nonzero(self.residency.slot_of >= 0) <= self.residency.slots


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_steps = Machine.TestCase


# ---- the optimum -------------------------------------------------------------------------------


def exhaustive(accesses, slots):
    """Fewest loads over all choices of victims."""
    best = {frozenset(): 0}
    for read in map(frozenset, accesses):
        after = {}
        for held, cost in best.items():
            lacking = read - held
            surplus = len(held | read) - slots
            for gone in itertools.combinations(sorted(held - read), max(0, surplus)):
                state = (held | read) - set(gone)
                after[state] = min(after.get(state, 10**9), cost + len(lacking))
        best = after
    return min(best.values())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 6), max_size=3), max_size=12), st.integers(3, 5))
def test_min_is_the_best_of_all_choices(reads, slots):
    accesses = [np.array(sorted(read), np.int32) for read in reads]
    assert fewest_loads(accesses, slots) == exhaustive(accesses, slots)


def test_min_refuses_a_read_that_does_not_fit():
    with pytest.raises(ConfigError, match="slots=2 must hold the widest read, 3 items"):
        fewest_loads([np.arange(3)], 2)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from(MODES),
    st.floats(0.1, 1),
    st.lists(st.frozensets(st.integers(0, 3), min_size=1), min_size=1, max_size=25),
)
def test_lookahead_that_sees_everything_is_min(seed, apart, mode, share, trace):
    bank = separate() if apart else tied(seed)
    slots = max(bank.least(mode), int(share * bank.total))
    residency = Residency(bank, slots * bank.page_bytes, mode=mode, record=True)
    loads = replay(residency, trace)
    assert residency.accesses is not None
    assert loads == fewest_loads(residency.accesses, residency.slots)
    for policy in POLICIES[1:]:
        other = Residency(bank, slots * bank.page_bytes, policy=policy, mode=mode, record=True)
        assert replay(other, trace) >= fewest_loads(other.accesses or [], other.slots)


@pytest.mark.parametrize("stay", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_256_queued_tokens_are_nearly_as_good_as_all(stay, share):
    bank, trace = separate(layers=4, experts=8), chain(3000, 8, stay)
    ours = Residency(bank, int(share * bank.total_bytes), record=True)
    for t, experts in enumerate(trace):
        ours.plan(experts, trace[t + 1 : t + 257])
    lru = Residency(bank, int(share * bank.total_bytes), policy="lru")
    for experts in trace:
        lru.plan(experts)
    assert ours.counters.loads <= 1.02 * fewest_loads(ours.accesses or [], ours.slots)
    assert ours.counters.loads <= lru.counters.loads


def test_layer_by_layer_lru_scores_zero_where_lookahead_does_not():
    """One page less than a step needs: cyclic order is the worst case of least recent use."""
    bank = separate(layers=4, experts=4)
    trace = [frozenset({0})] * 50
    lru = Residency(bank, 3 * bank.page_bytes, policy="lru")
    ours = Residency(bank, 3 * bank.page_bytes)
    assert replay(lru, trace) == 4 * 50
    assert replay(ours, trace, visible=4) == fewest_loads([np.array([i * 4]) for i in range(4)] * 50, 3)


# ---- policies against oracles --------------------------------------------------------------------


def naive(residency, trace, key):
    """Pages loaded when the victim is always the resident page, not of this read, with the smallest key.

    seen: pass that read a page last. order: rank of that read; within one pass resident pages come first. count: reads.
    """
    held, now, seen, order, count, log, tick = set(), 0, {}, {}, {}, [], itertools.count()
    for experts in trace:
        need = residency.bank.need(experts)
        groups = [[p + layer * residency.bank.pages for p in ids.tolist()] for layer, ids in enumerate(need)]
        if residency.mode == "column" and sum(map(len, groups)) <= residency.slots:
            groups = [sum(groups, [])]
        for group in groups:
            for item in group:
                count[item] = count.get(item, 0) + 1
            lacking = [i for i in group if i not in held]
            for item in lacking:
                if len(held) == residency.slots:
                    held.remove(min(held - set(group), key=lambda i: key(i, seen, order, count)))
                held.add(item)
                log.append(item)
            for item in [i for i in group if i not in lacking] + lacking:
                seen[item], order[item] = (
                    now + item // residency.bank.pages,
                    next(tick),
                )
        now += residency.bank.layers
    return log


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "policy, key",
    [
        ("lru", lambda i, seen, order, count: order[i]),
        ("lfu", lambda i, seen, order, count: (count[i], seen[i], i)),
    ],
)
@pytest.mark.parametrize("slots", [5, 7, 10])
def test_lru_and_lfu_are_what_their_names_say(policy, key, mode, slots):
    bank = separate(layers=3, experts=5)
    residency = Residency(bank, slots * bank.page_bytes, policy=policy, mode=mode)
    trace = chain(200, 5, 0.6, batch=2, seed=slots)
    log = []
    for experts in trace:
        log += residency.plan(experts).load_items.tolist()
    assert log == naive(residency, trace, key)


def test_random_is_seeded():
    bank, trace = separate(), chain(100, 4, 0.5)

    def loads(seed):
        residency = Residency(bank, 5 * bank.page_bytes, policy="random", seed=seed)
        return [residency.plan(experts).load_victims.tolist() for experts in trace]

    assert loads(1) == loads(1) != loads(2)


def test_ties_beyond_the_announced_future_go_by_oldest_step_then_highest_layer():
    bank = separate(layers=2, experts=4)
    residency = Residency(bank, 6 * bank.page_bytes)
    for e in (0, 1, 2):
        residency.plan(frozenset({e}))
    plan = residency.plan(frozenset({3}), [frozenset({0})])  # 0 is used next: expert 1 is oldest
    assert sorted(plan.load_victims.tolist()) == [1, 5]
    plan = residency.plan(frozenset({1}), [frozenset({0, 3})])
    assert sorted(plan.load_victims.tolist()) == [2, 6]


@pytest.mark.parametrize("later, victim", [(2, 1), (300, 0)])
def test_beyond_the_announced_future_often_counts_until_it_is_long_ago(later, victim):
    """Expert 0 in two steps, expert 1 in one after them, or `later` steps after them; who goes for expert 3?"""
    bank = separate(layers=1, experts=4)
    residency = Residency(bank, 3 * bank.page_bytes)
    for e in (0, 0, *[2] * (later - 1), 1, 3):
        plan = residency.plan(frozenset({e}), [frozenset({2})])
    assert plan.load_victims.tolist() == [victim]


def test_plans_depend_on_program_order_only():
    bank, trace = tied(1), chain(60, 4, 0.6, batch=2)
    for policy in POLICIES:
        one, two = (Residency(bank, bank.total_bytes // 2, policy=policy) for _ in range(2))
        plans = [one.plan(s, trace[t + 1 : t + 5]) for t, s in enumerate(trace)]  # all ahead of any execution
        for t, s in enumerate(trace):
            again = two.plan(s, trace[t + 1 : t + 5])
            assert again.load_items.tolist() == plans[t].load_items.tolist()
            assert again.slots.tolist() == plans[t].slots.tolist()
            assert again.free_at.tolist() == plans[t].free_at.tolist()


# ---- waves, columns, counters, errors --------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_steps_wider_than_the_pool_run_in_waves(policy, mode):
    bank = separate(layers=2, experts=4, pages=2)
    residency = Residency(bank, bank.least(mode) * bank.page_bytes, policy=policy, mode=mode)
    trace = [frozenset(range(4)), frozenset({0, 1}), frozenset(range(4)), frozenset({2})]
    replay(residency, trace)
    pool = residency.slots
    assert residency.counters.waves == 2 * (2 * (-(-8 // pool) - 1) + (-(-4 // pool) - 1))


def test_a_wave_reads_what_is_resident_first():
    bank = separate(layers=1, experts=4)
    residency = Residency(bank, 2 * bank.page_bytes)
    residency.plan(frozenset({2, 3}))
    plan = residency.plan(frozenset({0, 1, 2, 3}))
    assert plan.passes == 2 and plan.loads == 2
    assert sorted(plan.reads_of(0)[0].tolist()) == [2, 3] and sorted(plan.reads_of(1)[0].tolist()) == [0, 1]


def test_a_column_stays_whole_while_its_step_runs():
    bank = separate(layers=4, experts=4)
    trace = chain(100, 4, 0.5)
    for policy in POLICIES:
        residency = Residency(bank, 5 * bank.page_bytes, policy=policy, mode="column")
        device = Device(residency)
        for t, experts in enumerate(trace):
            device.run(residency.plan(experts, trace[t + 1 : t + 9]), experts, column=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_hits_are_counted_by_page_and_by_token(policy):
    bank, trace = tied(3), chain(60, 4, 0.6, batch=3)
    residency = Residency(bank, bank.total_bytes // 2, policy=policy)
    hits = total = 0
    for t, experts in enumerate(trace):
        tokens = {e: 1 + (t + e) % 3 for e in experts}
        plan = residency.plan(experts, trace[t + 1 : t + 4], tokens)
        for layer in range(bank.layers):
            loaded = {i - layer * bank.pages for i in plan.load_items.tolist() if i // bank.pages == layer}
            for e, count in tokens.items():
                total += count
                hits += count * (not any(bank.touch_LPE[layer, p, e] for p in loaded))
    counters = residency.counters
    assert (counters.token_layers, counters.token_layer_hits) == (total, hits)
    assert counters.token_hit_ratio == hits / total
    assert counters.hit_ratio == 1 - counters.bytes_loaded / counters.bytes_read
    assert 0 < counters.hit_ratio < 1


def test_all_resident_loads_everything_once():
    bank, trace = tied(2), chain(100, 4, 0.3, batch=2)
    for policy in POLICIES:
        residency = Residency(bank, bank.total_bytes, policy=policy)
        assert replay(residency, trace) == bank.need_count(frozenset().union(*trace))
        assert residency.counters.evictions == 0 and residency.missing(trace[0]) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "min"}, "residency='min' is not one of lookahead, lru, lfu, random"),
        ({"mode": "row"}, "residency_mode='row' is not one of layer, column"),
        ({"budget": 11}, r"expert_memory=11 bytes .* at least 12 bytes \(1 pages of 12\)"),
        ({"budget": 35, "mode": "column"}, r"expert_memory=35 bytes .* at least 36 bytes \(3 pages of 12\)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Residency(separate(), **{"budget": 100, **options})
    assert "\n" not in str(error.value)


def test_an_unknown_expert_is_refused_before_anything_changes():
    residency = Residency(separate(), 60)
    with pytest.raises(ConfigError, match=r"experts=\[4\] must be in 0..3"):
        residency.plan(frozenset({4}))
    assert residency.counters.steps == 0
