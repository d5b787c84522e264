"""Requests -> batches, one after the other, within the limits and the pages of KV cache. Pure Python.

    scheduler = Scheduler("fcfs", Limits(), PagePool(1000, 16))
    scheduler.add(request)
    while batch := scheduler.schedule():
        for request in scheduler.complete(batch, run(batch)):
            if request.generated == request.sampling.max_new_tokens:
                scheduler.finish(request, "length")

`schedule` may be called again before `complete`: a request whose next token is still being computed cannot be chosen,
the others can. Batches must be completed in the order in which they were formed.
"""

import bisect
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import get_args

from readme_jax.config import DataError, require
from readme_jax.serving.pages import PagePool
from readme_jax.serving.policies import BOUNDED, POLICIES, Cost, Draft, Growth, Limits, Policy, View, age, members
from readme_jax.serving.request import Batch, Reason, Request, Work

MissingBytes = Callable[[frozenset[int]], float]


class Scheduler:
    """Chooses what runs next.

    A request is unrouted (its experts are not all known), waiting, or live: one of at most `limits.max_live` between
    which batches are chosen. The waiting become live in order of arrival, when there are pages for their known tokens.
    When pages run out the youngest live request is sent back to wait and loses its pages. pool: of one device, or one
    pool for each: a request's pages are all on its `device`, and room for it is made there. Counters: `number` batches
    formed, `preemptions`, and `waits`, by how many batches each work had been passed over.
    """

    def __init__(self, policy: Policy, limits: Limits, pool: PagePool | Sequence[PagePool], cost: Cost | None = None):
        require(policy in POLICIES, f"policy={policy!r} is not one of {', '.join(get_args(Policy))}")
        require(policy != "expert-aware" or cost is not None, "policy=expert-aware needs a cost")
        self.policy, self.limits, self.cost = policy, limits, cost
        self.pools = [pool] if isinstance(pool, PagePool) else list(pool)
        self.pool = self.pools[0]
        self.live: list[Request] = []  # by age
        self.waits: Counter[int] = Counter()
        self.number = self.preemptions = 0
        self._unrouted: dict[Request, None] = {}
        self._waiting: deque[Request] = deque()  # by age; cancelled ones stay until they are at its head
        self._waiting_count = 0
        self._flying = 0
        self._chunks: dict[Request, tuple[int, Growth]] = {}
        self._view: View | None = None
        self._ahead: list[frozenset[int]] = []
        self._missing_bytes: MissingBytes | None = None

    @property
    def waiting(self) -> int:
        """Requests that are neither live nor finished."""
        return self._waiting_count + len(self._unrouted)

    @property
    def flying(self) -> int:
        """Batches formed and not completed."""
        return self._flying

    @property
    def unfinished(self) -> int:
        """Requests that are not finished."""
        return len(self.live) + self.waiting

    def add(self, request: Request) -> None:
        """A new request. DataError if it could not run even alone.

        If not all its tokens are routed yet, call `routed` when they are.
        """
        longest = len(request.tokens) + request.sampling.max_new_tokens - 1
        pool = self.pools[request.device]
        need, pages = pool.pages_for(longest), pool.pages
        message = f"prompt of {len(request.prompt)} tokens and max_new_tokens={request.sampling.max_new_tokens} need"
        require(need <= pages, f"{message} {need} KV pages; there are {pages}", DataError)
        pool.digest(request.tokens, request.digests)
        if len(request.experts) == len(request.tokens):
            self._wait(request)
        else:
            self._unrouted[request] = None

    def routed(self, request: Request) -> None:
        """All known tokens of a request have their experts: from now on it can run. A finished one is left alone."""
        if request in self._unrouted:
            del self._unrouted[request]
            self._wait(request)

    def cancel(self, request: Request) -> None:
        """`finish` with reason "cancelled"; a finished request stays as it is."""
        self.finish(request, "cancelled")

    def finish(self, request: Request, reason: Reason) -> None:
        """It ends here, wherever it is. What is on the device is computed to its end, and its pages are free then."""
        if request.state == "finished":
            return
        if request in self._unrouted:
            del self._unrouted[request]
        elif request.state == "waiting":
            self._waiting_count -= 1
        else:
            self.live.remove(request)
            self._changed()
        self._chunks.pop(request, None)
        request.state, request.reason = "finished", reason
        if not request.flying:
            self.pools[request.device].release(request.pages)

    def schedule(self, now: float = 0.0, missing_bytes: MissingBytes | None = None) -> Batch | None:
        """The next batch; None if nothing can run before another batch is completed or a request is added.

        now: seconds, for `Request.started`. missing_bytes: bytes of these experts that are not on the device and not on
        their way, which expert-aware weighs (about ten calls, of other sets each).
        """
        self._admit()
        self._catch_up()
        self._missing_bytes = missing_bytes
        view = self._view = self._look()
        draft = Draft(self.limits)
        draft.grant = lambda request, end, urgent: self._grant(view, draft, request, end, urgent)
        POLICIES[self.policy](view, draft)
        self._ahead = []
        if not draft.picks:
            view.flying = False
            view.expect(self.live)
            return None
        view.close(draft)
        for request, _, count in draft.picks:
            request.flying += count
            waited = self.number - request.since
            self.waits[waited] += 1
            request.passed_over += waited
            request.since = self.number + 1
            if request.started is None:
                request.started = now
        self.number += 1
        self._flying += 1
        view.expect(self.live)
        return Batch(tuple([Work(*pick) for pick in draft.picks]))

    def complete(self, batch: Batch, sampled: Sequence[tuple[int, int] | None], now: float = 0.0) -> list[Request]:
        """The results of a batch: (token, its expert) for each work that samples, None for the others.

        now: seconds, for the times of tokens. Returns the requests that got a token, for the caller to `finish` those
        that end with it before it schedules again. Requests finished meanwhile get none.
        """
        got = []
        size = self.pool.page_tokens
        for work, result in zip(batch.works, sampled, strict=True):
            request = work.request
            pool = self.pools[request.device]
            request.flying -= work.count
            if request.state == "finished":
                if not request.flying:
                    pool.release(request.pages)
                continue
            start = request.computed
            request.computed = end = start + work.count
            if start // size != end // size:
                pool.seal(request.pages, request.digests, start, end)
            if work.samples:
                assert result is not None, "a work that samples has a token and its expert"
                request.tokens.append(result[0])
                request.experts.append(result[1])
                if len(request.tokens) % size == 0:
                    pool.digest(request.tokens, request.digests)
                if request.first_token is None:
                    request.first_token = now
                request.last_token = now
                request.since = self.number
                self._chunks.pop(request, None)
                got.append(request)
        self._flying -= 1
        self._changed()
        return got

    def upcoming(self, count: int) -> list[frozenset[int]]:
        """Experts of the next `count` batches (or fewer), as they would be if nothing arrived and nothing were sampled
        but the tokens on the device, which keep their experts.

        Each token that is known and not on the device runs once: prompts, and the one next token of those that decode.
        Requests on the device come back once (`View.expect`): what they ask for next is likely what is being read now.
        """
        if self._view is None:
            self._view = self._look()
            self._view.expect(self.live)
        while len(self._ahead) < count:
            draft = Draft(self.limits)
            POLICIES[self.policy](self._view, draft)
            if not draft.picks:
                break
            self._view.close(draft)
            self._ahead.append(members(draft.experts))
        return self._ahead[:count]

    # ---- who may run ----------------------------------------------------------------------------

    def _changed(self) -> None:
        self._view, self._ahead = None, []

    def _look(self) -> View:
        limits = self.limits
        patience = limits.patience(len(self.live)) if self.policy in BOUNDED else math.inf
        flying = self._flying > 0
        return View(self.live, limits, self.number, patience, self.cost, self._missing_bytes, self._chunks, flying)

    def _wait(self, request: Request) -> None:
        """Into the waiting line, in order of age: nearly always at one of its ends."""
        waiting, mine = self._waiting, age(request)
        self._waiting_count += 1
        if waiting and mine < age(waiting[0]):
            waiting.appendleft(request)
            return
        place = len(waiting)
        while place and mine < age(waiting[place - 1]):
            place -= 1
        waiting.insert(place, request)

    def _admit(self) -> None:
        """The oldest waiting requests become live while there is room for all their known tokens.

        Besides what the live ones need for theirs, one page for each of them is left, so that they can go on for a
        while and the newcomer is not sent back at once.
        """
        waiting = self._waiting
        while waiting and waiting[0].state == "finished":
            waiting.popleft()
        if not waiting or len(self.live) >= self.limits.max_live:
            return
        room, count = [pool.available for pool in self.pools], [0] * len(self.pools)
        for r in self.live:
            room[r.device] -= self.pool.lacking(r.pages, len(r.tokens)) + 1
            count[r.device] += 1
        while waiting and len(self.live) < self.limits.max_live:
            request = waiting[0]
            if request.state != "finished":
                device, pool = request.device, self.pools[request.device]
                before = pool.available
                self._share(request)
                room[device] -= before - pool.available
                lacking = pool.lacking(request.pages, len(request.tokens))
                if lacking > room[device] and count[device]:
                    pool.reused_tokens -= request.computed
                    request.computed = 0
                    pool.release(request.pages)
                    return
                room[device] -= lacking + 1
                count[device] += 1
                request.state, request.since = "running", self.number
                bisect.insort(self.live, request, key=age)
                self._waiting_count -= 1
            waiting.popleft()

    def _catch_up(self) -> None:
        """Prompts take over pages of their prefix that others have computed meanwhile."""
        if self.pool.reuse:
            for request in self.live:
                if len(request.tokens) - request.computed > 1 and not request.flying:
                    if request.computed == len(request.pages) * self.pool.page_tokens:
                        self._share(request)

    def _share(self, request: Request) -> None:
        """Take over pages of the same prefix; one token at least is left to compute."""
        pool = self.pools[request.device]
        found = pool.share(request.pages, request.digests, (len(request.tokens) - 1) // pool.page_tokens)
        request.computed += found * pool.page_tokens

    # ---- pages ----------------------------------------------------------------------------------

    def _grant(self, view: View, draft: Draft, request: Request, end: int, urgent: bool) -> bool:
        """Pages for the tokens before `end`.

        If there are too few, younger requests of its device lose theirs, the youngest first, as long as they are
        neither on the device nor in this batch. One that holds no pages yet waits instead, unless it is urgent.
        """
        pool, place = self.pools[request.device], len(self.live) - 1
        if end <= len(request.pages) * pool.page_tokens:
            return True
        while pool.lacking(request.pages, end) > pool.available:
            while place >= 0 and (victim := self.live[place]) is not request:
                here = victim.device == request.device
                if here and victim.pages and not victim.flying and victim not in draft.taken:
                    break
                place -= 1
            else:
                return False
            if not request.pages and not urgent:
                return False
            view.remove(victim)
            self._preempt(victim)
            place -= 1
        return pool.grow(request.pages, end)

    def _preempt(self, request: Request) -> None:
        self.pools[request.device].release(request.pages)
        self.live.remove(request)
        request.computed, request.state = 0, "waiting"
        request.preempted += 1
        self.preemptions += 1
        self._wait(request)
