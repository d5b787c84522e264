"""Scheduling: what each policy picks, that no one starves, that no page or token is lost."""

import collections
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax.config import ConfigError, DataError
from readme_jax.serving.pages import PagePool
from readme_jax.serving.policies import BOUNDED, POLICIES, Cost, Limits, growth, members
from readme_jax.serving.request import Request, SamplingParams
from readme_jax.serving.scheduler import Scheduler

FFN = Cost(read_bytes=lambda experts: 10 * len(experts), fixed_bytes=20, load=10)


def scheduler(policy="fcfs", pages=1000, page_tokens=4, reuse=True, cost=FFN, **limits):
    return Scheduler(policy, Limits(**limits), PagePool(pages, page_tokens, reuse=reuse), cost)


def request(experts, new=1, arrival=0.0, prompt=None):
    """A request whose prompt tokens take these experts."""
    tokens = list(prompt or range(len(experts)))
    made = Request(prompt=tokens, sampling=SamplingParams(max_new_tokens=new), arrival=arrival)
    made.experts = list(experts)
    return made


def ran(batch):
    """Who ran how much: [(request number, start, count)]."""
    return [(work.request.number, work.start, work.count) for work in batch.works]


def complete(s, batch, expert=0, token=7, now=0.0):
    """Every work that samples gets this token and expert; who has enough ends. The requests that got one."""
    got = s.complete(batch, [(token, expert) if work.samples else None for work in batch.works], now)
    for r in got:
        if r.generated >= r.sampling.max_new_tokens:
            s.finish(r, "length")
    return got


def decoding(s, experts, new=1000, arrival=0.0):
    """Live requests, each with one token to compute, of these experts."""
    made = [request([expert], new, arrival + 0.001 * i) for i, expert in enumerate(experts)]
    for r in made:
        s.add(r)
    return made


# ---- one policy after the other -----------------------------------------------------------------


def test_fcfs_runs_the_oldest_first_in_chunks():
    s = scheduler(batch_requests=2, batch_tokens=8, chunk=6)
    late, early = request([0] * 9, arrival=2.0), request([1] * 8, arrival=1.0)
    s.add(late)
    s.add(early)
    first = s.schedule()
    assert ran(first) == [(early.number, 0, 6), (late.number, 0, 2)]
    assert (first.tokens, first.experts) == (8, {0, 1})
    assert [work.samples for work in first.works] == [False, False]
    second = s.schedule()  # while the first is on the device: the rest of both prompts is known
    assert ran(second) == [(early.number, 6, 2), (late.number, 2, 6)]
    assert [work.samples for work in second.works] == [True, False]
    assert ran(s.schedule()) == [(late.number, 8, 1)]
    assert s.schedule() is None and s.flying == 3  # both last tokens are being computed


def test_a_token_comes_back_before_the_next_is_asked():
    s = scheduler()
    r = request([3, 3], new=2)
    s.add(r)
    batch = s.schedule(now=1.0)
    assert s.schedule() is None
    assert complete(s, batch, expert=5, token=42, now=2.0) == [r]
    assert (r.tokens, r.experts, r.computed, r.flying) == ([0, 1, 42], [3, 3, 5], 2, 0)
    assert (r.started, r.first_token, r.last_token, r.state) == (1.0, 2.0, 2.0, "running")
    assert ran(s.schedule()) == [(r.number, 2, 1)]


def test_decode_and_prefill_mix_as_the_policy_says():
    for policy, order in (("decode-first", [1, 0]), ("prefill-first", [0, 1]), ("fcfs", [0, 1])):
        s = scheduler(policy, batch_tokens=4, chunk=4, batch_requests=4)
        prompt, short = request([0] * 6, arrival=0.0), request([1], arrival=1.0)
        s.add(prompt)
        s.add(short)
        both = [prompt.number, short.number]
        expected = {"decode-first": [(1, 0, 1), (0, 0, 3)]}.get(policy, [(0, 0, 4)])
        assert [(both.index(n), start, count) for n, start, count in ran(s.schedule())] == expected, order


def test_longest_queue_takes_the_expert_most_ask_for():
    s = scheduler("longest-queue", batch_requests=4)
    a = decoding(s, [2, 1, 1, 0, 1, 0])
    assert [a.index(work.request) for work in s.schedule().works] == [1, 2, 4, 3]


def test_longest_queue_counts_the_tokens_of_prompts():
    s = scheduler("longest-queue", batch_requests=2, batch_tokens=8, chunk=4)
    one, two = decoding(s, [1, 1])
    prompt = request([0, 2, 0], arrival=9.0)
    s.add(prompt)
    assert ran(s.schedule()) == [(prompt.number, 0, 3), (one.number, 0, 1)]


def test_expert_aware_takes_what_is_here_and_all_that_rides_free():
    s = scheduler("expert-aware", batch_requests=8)
    a = decoding(s, [0, 0, 0, 1, 2])
    here = {1}
    batch = s.schedule(missing_bytes=lambda experts: 100 * len(experts - here))
    assert [a.index(work.request) for work in batch.works] == [3]
    s = scheduler("expert-aware", batch_requests=8)
    a = decoding(s, [0, 0, 0, 1, 2])
    batch = s.schedule(missing_bytes=lambda experts: 0)  # only reading costs: a wider step lowers the share of each
    assert [a.index(work.request) for work in batch.works] == [0, 1, 2]
    prompt = request([0, 0, 0, 0], arrival=9.0)
    s.add(prompt)
    complete(s, batch, expert=0)
    assert {work.request for work in s.schedule().works} == {*a[:3], prompt}


def test_expert_aware_waits_for_the_device_rather_than_load():
    s = scheduler("expert-aware", batch_requests=4, max_wait=None)
    decoding(s, [0, 1])
    missing = lambda experts: 1000 * len(experts - {0})  # noqa: E731
    batch = s.schedule(missing_bytes=missing)
    assert batch.experts == {0}
    assert s.schedule(missing_bytes=missing) is None
    assert s.upcoming(2) == [{0}, {1}]  # both are known all the same: who comes back, and what could be fetched
    complete(s, batch, expert=0)
    assert s.schedule(missing_bytes=missing).experts == {0}
    other = scheduler("expert-aware", batch_requests=4)
    decoding(other, [1])
    assert other.schedule(missing_bytes=missing).experts == {1}  # nothing on the device: no reason to wait


def test_expert_aware_cuts_a_chunk_where_its_set_grows():
    s = scheduler("expert-aware", batch_tokens=64, chunk=32)
    prompt = request([1] * 20 + [2] * 12)
    s.add(prompt)
    decoding(s, [1, 1, 1], arrival=1.0)
    batch = s.schedule(missing_bytes=lambda experts: 100 * len(experts - {1}))
    assert batch.experts == {1} and (prompt.number, 0, 20) in ran(batch) and len(batch.works) == 4
    s = scheduler("expert-aware", batch_tokens=64, chunk=32)
    s.add(request([1] * 4 + [2] * 28))  # hardly anything comes before the cut
    decoding(s, [1, 1, 1], arrival=1.0)
    assert len(s.schedule(missing_bytes=lambda experts: 100 * len(experts - {1})).works) == 3


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_growth_is_that_of_every_prefix(experts, data):
    start = data.draw(st.integers(0, len(experts) - 1))
    cuts = growth(experts, start, len(experts))
    assert cuts[-1][0] == len(experts) - start
    for count in range(1, len(experts) - start + 1):
        mask = next(mask for stop, mask in cuts if count <= stop)
        assert members(mask) == set(experts[start : start + count])
    assert len(cuts) == len(set(experts[start:]))


# ---- starvation -----------------------------------------------------------------------------------


def unpopular(policy, max_wait, steps=200):
    """While requests of expert 0 never cease to come: how often the one of expert 1 ran, the longest wait."""
    s = scheduler(policy, batch_requests=2, max_live=8, max_wait=max_wait)
    lone = decoding(s, [1])[0]
    missing = lambda experts: 100 * len(experts - {0})  # noqa: E731
    runs = 0
    for step in range(steps):
        while len(s.live) + s.waiting < 8:
            s.add(request([0], new=20, arrival=1.0 + step))
        batch = s.schedule(missing_bytes=missing)
        runs += any(work.request is lone for work in batch.works)
        s.complete(batch, [(7, work.request.experts[0]) for work in batch.works])
        for work in batch.works:
            if work.request.generated == work.request.sampling.max_new_tokens:
                s.finish(work.request, "length")
    return runs, max(s.waits)


def test_the_papers_longest_queue_starves_an_unpopular_expert():
    assert unpopular("longest-queue", None)[0] == 0
    assert unpopular("expert-aware", None)[0] == 0


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("max_wait", [1, 2, 3.5])
def test_ours_is_bounded_on_the_same_arrivals(policy, max_wait):
    runs, longest = unpopular(policy, max_wait)
    bound = max_wait * 8 / 2
    assert longest <= bound and runs >= 200 // (bound + 1)


@pytest.mark.parametrize("policy", BOUNDED)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 5), live=st.integers(1, 24), wait=st.sampled_from([1, 1.5, 3]))
def test_no_decoding_request_waits_longer_than_the_bound(policy, seed, batch, live, wait):
    rng = random.Random(seed)
    depth = rng.randint(1, 3)
    s = scheduler(policy, batch_requests=batch, max_live=live, max_wait=wait)
    popular = [0] * rng.randint(1, 30) + [1, 2, 3]
    flights = []
    for _ in range(150):
        while s.unfinished < live + 2:
            s.add(request([rng.choice(popular)], new=rng.randint(1, 40), arrival=rng.random()))
        here = {rng.choice(popular)}
        new = s.schedule(missing_bytes=lambda experts, here=here: 50 * len(experts - here))
        flights += [new] if new else []
        if flights and (not new or len(flights) == depth):
            complete(s, flights.pop(0), expert=rng.choice(popular))
    assert max(s.waits) <= -(-wait * live // batch)


# ---- pages ----------------------------------------------------------------------------------------


def test_the_youngest_loses_its_pages_and_comes_back_in_its_old_place():
    s = scheduler(pages=6, page_tokens=2, reuse=False)
    old, young = request([0] * 3, new=7, arrival=1.0), request([0] * 3, new=6, arrival=2.0)
    s.add(young)
    s.add(old)
    late = request([0], new=2, arrival=3.0)
    while not young.preempted:
        complete(s, s.schedule())
        if s.number == 2:
            s.add(late)
    assert (old.preempted, young.computed, young.pages, young.state) == (0, 0, [], "waiting")
    kept = list(young.tokens)
    while old.state != "finished":
        complete(s, s.schedule())
    order = []
    while s.unfinished:
        batch = s.schedule()
        order += [work.request for work in batch.works]
        complete(s, batch)
    assert young.tokens[: len(kept)] == kept and young.generated == 6 and order[0] is young
    assert s.pool.available == 6 and s.preemptions == young.preempted >= 1


def test_room_is_made_on_the_device_that_lacks_it():
    """Two devices: who needs pages on one does not take them from the other, however young those are there."""
    pools = [PagePool(6, 2, reuse=False, first=6 * x) for x in range(2)]
    s = Scheduler("fcfs", Limits(batch_requests=4, batch_tokens=64, chunk=16), pools)
    made = [request([0] * 4, new=6, arrival=float(i)) for i in range(5)]
    for r, device in zip(made, (0, 0, 1, 1, 1)):
        r.device = device
        s.add(r)
    while s.unfinished:
        complete(s, s.schedule())
        for r in made:
            assert all(page // 6 == r.device for page in r.pages)
            assert len(r.pages) <= 6
        ids = [page for r in made for page in r.pages]
        assert len(ids) == len(set(ids))
    assert [r.generated for r in made] == [6] * 5 and made[0].preempted == made[2].preempted == 0
    assert s.preemptions > 0 and [pool.available for pool in pools] == [6, 6]


def test_who_is_admitted_finds_room_on_his_own_device():
    pools = [PagePool(5, 2, reuse=False, first=5 * x) for x in range(2)]
    s = Scheduler("fcfs", Limits(batch_requests=4, batch_tokens=64, chunk=16), pools)
    made = [request([0] * 8, new=2, arrival=float(i)) for i in range(4)]
    for r, device in zip(made, (0, 1, 1, 0)):
        r.device = device
        s.add(r)
    batch = s.schedule()
    assert [work.request for work in batch.works] == s.live == made[:2] and s.waiting == 2
    complete(s, batch)
    while s.unfinished:
        complete(s, s.schedule())
    assert s.preemptions == 0 and [pool.available for pool in pools] == [5, 5]


def test_a_full_device_does_not_take_from_another():
    pools = [PagePool(4, 2, reuse=False, first=4 * x) for x in range(2)]
    s = Scheduler("fcfs", Limits(batch_requests=4, batch_tokens=64, chunk=16), pools)
    old, young = request([0] * 6, new=3), request([0] * 6, new=3, arrival=1.0)
    young.device = 1
    for r in (old, young):
        s.add(r)
    while s.unfinished:
        complete(s, s.schedule())
    assert s.preemptions == 0 and old.generated == young.generated == 3
    with pytest.raises(DataError, match="need 5 KV pages; there are 4"):
        s.add(request([0] * 8, new=2))


def test_a_request_in_flight_keeps_its_pages():
    s = scheduler(pages=3, page_tokens=2, reuse=False, batch_requests=1)
    old, young = request([0] * 2, new=3, arrival=1.0), request([0] * 1, new=2, arrival=2.0)
    s.add(old)
    s.add(young)
    first = s.schedule()
    second = s.schedule()
    assert second.works[0].request is young
    complete(s, first)
    third = s.schedule()
    assert third.works[0].request is old and len(old.pages) == 2  # the last free page
    complete(s, second)
    complete(s, third)
    assert ran(s.schedule()) == [(old.number, 3, 1)]
    assert young.preempted == 0


def test_who_lost_its_pages_for_a_batch_is_not_in_it():
    s = scheduler("expert-aware", pages=10, page_tokens=1, reuse=False, batch_requests=2, max_wait=7)
    old, long, short = request([1] * 4), request([0], new=10, arrival=1.0), request([0], new=5, arrival=2.0)
    for r in (old, long, short):
        s.add(r)
    missing = lambda experts: 1000 * len(experts - {0})  # noqa: E731
    batch = s.schedule(missing_bytes=missing)
    while old not in {work.request for work in batch.works}:
        s.complete(batch, [(7, 2 if work.request is short else 0) for work in batch.works])
        batch = s.schedule(missing_bytes=missing)
    assert ran(batch) == [(old.number, 0, 4)]  # both had to go: `short` held too few pages
    assert (long.state, short.state, s.preemptions, len(old.pages)) == ("waiting", "waiting", 2, 4)


def test_no_one_is_let_in_only_to_be_sent_back():
    s = scheduler(pages=7, page_tokens=2, reuse=False)
    first, second = request([0] * 9, new=3, arrival=1.0), request([0] * 3, new=2, arrival=2.0)
    s.add(first)
    s.add(second)
    while first.state != "finished":
        batch = s.schedule()
        assert s.live == [first] and s.waiting == 1  # 2 pages are free, and `first` will want one of them
        complete(s, batch)
    assert ran(s.schedule()) == [(second.number, 0, 3)] and s.preemptions == 0


def test_a_prefix_is_computed_once_even_by_one_that_came_at_the_same_time():
    s = scheduler(page_tokens=2, batch_requests=1, chunk=4, max_live=4)
    first, second = request([0] * 9, arrival=1.0), request([0] * 9, arrival=2.0)
    s.add(first)
    s.add(second)
    starts = collections.defaultdict(list)
    while s.unfinished:
        batch = s.schedule()
        for number, start, count in ran(batch):
            starts[number].append((start, count))
        complete(s, batch)
    assert starts[first.number] == [(0, 4), (4, 4), (8, 1)]
    assert starts[second.number] == [(8, 1)] and s.pool.reused_tokens == 8


def test_what_can_never_run_is_refused():
    s = scheduler(pages=4, page_tokens=4)
    s.add(request([0] * 10, new=7))  # the last token is never computed
    with pytest.raises(DataError, match="prompt of 10 tokens and max_new_tokens=8 need 5 KV pages; there are 4"):
        s.add(request([0] * 10, new=8))
    assert s.unfinished == 1


# ---- coming and going -----------------------------------------------------------------------------


def test_an_unrouted_request_waits_for_its_experts():
    s = scheduler()
    r = Request(prompt=[1, 2], sampling=SamplingParams())
    s.add(r)
    assert s.schedule() is None and (s.waiting, s.unfinished) == (1, 1)
    r.experts = [0, 1]
    s.routed(r)
    assert s.schedule().experts == {0, 1}


def test_routed_out_of_order_keeps_the_order_of_arrival():
    s = scheduler(batch_requests=1, max_live=1)
    made = [Request(prompt=[1], sampling=SamplingParams(max_new_tokens=1), arrival=float(i)) for i in range(5)]
    for r in made:
        s.add(r)
    for i in (4, 2, 0, 3, 1):
        made[i].experts = [0]
        s.routed(made[i])
    order = []
    while s.unfinished:
        batch = s.schedule()
        order += [work.request for work in batch.works]
        complete(s, batch)
    assert order == made


def test_cancelled_in_every_state():
    s = scheduler(pages=8, page_tokens=2, max_live=2, batch_requests=2)
    flying, running, waiting = (request([0] * 3, new=5, arrival=float(i)) for i in range(3))
    unrouted = Request(prompt=[1], sampling=SamplingParams(max_new_tokens=1))
    for r in (flying, running, waiting, unrouted):
        s.add(r)
    batch = s.schedule()
    s.cancel(unrouted)
    unrouted.experts = [0]
    s.routed(unrouted)  # the router comes back too late
    s.cancel(waiting)
    s.cancel(flying)
    assert flying.pages and s.pool.available < 8  # the device may still write them
    assert complete(s, batch) == [running] and flying.pages == []
    s.cancel(running)
    s.finish(running, "stop")
    assert {r.reason for r in (flying, running, waiting, unrouted)} == {"cancelled"}
    assert (s.unfinished, s.waiting, s.flying, s.pool.available, s.schedule()) == (0, 0, 0, 8, None)


def test_pages_stay_until_the_last_of_two_batches_is_through():
    s = scheduler(pages=8, page_tokens=2, chunk=4)
    r = request([0] * 8)
    s.add(r)
    first, second = s.schedule(), s.schedule()
    s.cancel(r)
    assert complete(s, first) == [] and len(r.pages) == 4 and s.pool.available == 4
    assert complete(s, second) == [] and s.pool.available == 8


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"batch_requests": 0}, "batch_requests=0 must be at least 1"),
        ({"batch_requests": 600}, "batch_requests=600 must be at most batch_tokens=512"),
        ({"chunk": 513}, "chunk=513 must be at most batch_tokens=512"),
        ({"max_wait": 0.5}, "max_wait=0.5 must be at least 1, or none"),
    ],
)
def test_limits_are_checked(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)


def test_the_policy_is_checked():
    with pytest.raises(ConfigError, match="policy='best' is not one of fcfs, decode-first, prefill-first"):
        scheduler("best")
    with pytest.raises(ConfigError, match="policy=expert-aware needs a cost"):
        scheduler("expert-aware", cost=None)


# ---- lookahead ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_upcoming_is_what_comes_if_tokens_on_the_device_keep_their_expert(policy, seed):
    rng = random.Random(seed)
    limits = dict(batch_requests=rng.randint(1, 4), batch_tokens=rng.randint(8, 20), chunk=rng.randint(1, 8))
    limits |= dict(max_live=rng.randint(1, 12), max_wait=rng.choice([1, 2, None]))
    s = scheduler(policy, page_tokens=2, reuse=False, **limits)
    for i in range(12):
        s.add(request([rng.randrange(4) for _ in range(rng.randint(1, 20))], new=20, arrival=float(i)))
    for _ in range(rng.randint(0, 5)):
        batch = s.schedule()
        if batch:
            complete(s, batch, expert=rng.randrange(4))
    batch = s.schedule()
    ahead = batch and s.upcoming(4)
    assert s.upcoming(2) == (ahead or [])[:2]
    if batch:
        s.complete(batch, [(7, work.request.experts[-1]) if work.samples else None for work in batch.works])
    batches = [s.schedule() for _ in range(4)]  # none of these is completed, so no other token becomes known
    assert ahead is None or ahead == [batch.experts for batch in batches if batch]


def test_upcoming_holds_the_one_known_token_of_each_that_decodes():
    s = scheduler(batch_requests=2)
    decoding(s, [0, 1, 2, 3, 4])
    batch = s.schedule()
    assert batch.experts == {0, 1} and s.upcoming(9) == [{0, 1}, {2, 3}, {4}]  # those two come back, once
    complete(s, batch, expert=6)
    assert s.upcoming(9) == [{6}, {2, 3}, {4}]  # asked before the next batch: that one is among them


def test_who_ends_is_not_expected_back():
    s = scheduler(batch_requests=2)
    last, first = decoding(s, [0], new=1), decoding(s, [1, 2], new=2, arrival=1.0)
    assert s.schedule().experts == {0, 1} and s.upcoming(9) == [{1, 2}]
    s.finish(first[0], "cancelled")
    assert s.upcoming(9) == [{2}] and last[0].state == "running"


# ---- anything at any time -------------------------------------------------------------------------


class Device:
    """Keeps, for every page, the tokens that lie in it and before it; programs run in the order they are sent."""

    def __init__(self, size):
        self.size, self.contents = size, {}

    def run(self, batch):
        for work in batch.works:
            r = work.request
            end = work.start + work.count
            assert len(r.pages) >= -(-end // self.size)
            for block in range(-(-work.start // self.size)):
                upto = min(work.start, (block + 1) * self.size)
                assert self.contents[r.pages[block]][:upto] == r.tokens[:upto], "reads what another request wrote"
            for position in range(work.start, end):
                self.contents[r.pages[position // self.size]] = r.tokens[: position + 1]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_every_request_ends_once_and_nothing_is_lost(policy, seed):
    rng = random.Random(seed)
    size, pages, depth = rng.randint(1, 3), rng.randint(4, 30), rng.randint(1, 3)
    limits = dict(batch_requests=rng.randint(1, 6), batch_tokens=rng.randint(6, 24), chunk=rng.randint(1, 6))
    s = scheduler(
        policy,
        pages,
        size,
        rng.random() < 0.7,
        max_live=rng.randint(1, 10),
        max_wait=rng.choice([1, 4, None]),
        **limits,
    )
    device, flights, ended, coming = Device(size), [], collections.Counter(), 40
    everyone, unrouted = [], []
    for _ in range(5000):
        if coming and rng.random() < 0.4:
            coming -= 1
            r = request([rng.randrange(4) for _ in range(rng.randint(1, 12))], rng.randint(1, 6), rng.random())
            r.prompt[:] = r.tokens[:] = [rng.randrange(2) for _ in r.prompt]
            late = r.experts if rng.random() < 0.3 else None
            r.experts = [] if late else r.experts
            try:
                s.add(r)
            except DataError:
                assert s.pool.pages_for(len(r.prompt) + r.sampling.max_new_tokens - 1) > pages
                continue
            everyone.append(r)
            unrouted += [(r, late)] if late else []
        if unrouted and rng.random() < 0.5:
            r, r.experts = unrouted.pop(rng.randrange(len(unrouted)))
            s.routed(r)
        if everyone and rng.random() < 0.05:
            s.cancel(rng.choice(everyone))
        here = {rng.randrange(4)}
        batch = s.schedule(missing_bytes=lambda experts, here=here: 50 * len(experts - here))
        if rng.random() < 0.5:
            s.upcoming(rng.randint(1, 5))
        if batch:
            assert len(batch.works) <= limits["batch_requests"] and batch.tokens <= limits["batch_tokens"]
            assert len({work.request for work in batch.works}) == len(batch.works)
            for work in batch.works:
                assert work.request.state == "running" and 1 <= work.count <= limits["chunk"]
                assert work.start + work.count == work.request.computed + work.request.flying
            device.run(batch)
            flights.append(batch)
        elif not flights and not coming and not unrouted:
            break
        while flights and (not batch or len(flights) >= depth or rng.random() < 0.3):
            batch = flights.pop(0)
            results = [(rng.randrange(2), rng.randrange(4)) if work.samples else None for work in batch.works]
            before = {work.request: work.request.generated for work in batch.works}
            for r in s.complete(batch, results, 0.0):
                assert r.generated == before[r] + 1 and len(r.experts) == len(r.tokens)
                if r.generated == r.sampling.max_new_tokens:
                    s.finish(r, "length")
        assert len(s.live) <= s.limits.max_live
        held = [page for r in everyone for page in r.pages]
        assert [s.pool.users(page) for page in range(pages)] == [held.count(page) for page in range(pages)]
    else:
        raise AssertionError("no end: requests push each other out for ever")
    for r in everyone:
        ended[r.reason] += 1
        assert r.state == "finished" and r.pages == [] and r.flying == 0
        assert r.reason == "cancelled" or r.generated == r.sampling.max_new_tokens
    assert sum(ended.values()) == len(everyone) and s.unfinished == s.flying == 0
    assert s.pool.available == pages and not s._chunks
