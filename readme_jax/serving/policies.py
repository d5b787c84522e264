"""Which of the requests that could run make up a batch: fcfs, decode-first, prefill-first, longest-queue, expert-aware.

A policy is a function of a `View` (what could run) and a `Draft` (the batch so far). It knows nothing of time or of the
device, so the same function also tells what the batches after this one would be.
"""

import dataclasses
import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Literal

from readme_jax.config import require
from readme_jax.serving.request import Request

Policy = Literal["fcfs", "decode-first", "prefill-first", "longest-queue", "expert-aware"]

PROMPTS = 8  # prompts weighed against each other for one place in a batch, the oldest: bounds the time a batch takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much runs at once. ConfigError for a value that no batch could keep."""

    batch_requests: int = 16
    """Requests of a batch at most."""
    batch_tokens: int = 512
    """Tokens of a batch at most."""
    chunk: int = 256
    """Prompt tokens of one request in a batch at most."""
    max_live: int = 64
    """Requests between which a batch is chosen; those beyond wait in order of arrival."""
    max_wait: float | None = 4.0
    """Batches that longest-queue and expert-aware may pass a request over, as a multiple of live requests /
    batch_requests (what taking turns would cost); none: no bound, as in the paper."""

    def __post_init__(self):
        for name in ("batch_requests", "batch_tokens", "chunk", "max_live"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("batch_requests", "chunk"):
            value = getattr(self, name)
            require(value <= self.batch_tokens, f"{name}={value} must be at most batch_tokens={self.batch_tokens}")
        good = self.max_wait is None or self.max_wait >= 0
        require(good, f"max_wait={self.max_wait} must be 0 or more, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What expert-aware weighs. A byte of device memory read is the unit.

    read_bytes: FFN bytes that a step with these experts reads, all layers. fixed_bytes: what a step costs whatever its
    experts (other weights, launches: seconds x bandwidth). load: bytes read in the time that one byte takes over the
    link (bandwidth of the memory / of the link).
    """

    read_bytes: Callable[[frozenset[int]], float]
    fixed_bytes: float = 0.0
    load: float = 16.0


@functools.cache
def only(expert: int) -> frozenset[int]:
    """The set of one expert."""
    return frozenset((expert,))


def growth(experts: list[int], start: int, end: int) -> list[tuple[int, frozenset[int]]]:
    """How the set of experts grows along experts[start:end]: (tokens that do with this set, set), smallest first."""
    firsts = sorted((experts.index(expert, start, end), expert) for expert in set(experts[start:end]))
    ends = [first for first, _ in firsts[1:]] + [end]
    grown = itertools.accumulate((only(expert) for _, expert in firsts), operator.or_)
    return [(stop - start, experts_so_far) for stop, experts_so_far in zip(ends, grown, strict=True)]


class Draft:
    """A batch in the making: picks (request, start, count), the room left, the experts so far.

    worth: requests brought forward, a part of a chunk counting as its share. grant(request, end, urgent): finds room
    for the keys and values of tokens before `end`; none where a batch is only imagined.
    """

    def __init__(self, limits: Limits, grant: Callable[[Request, int, bool], bool] | None = None):
        self.requests, self.tokens, self.grant = limits.batch_requests, limits.batch_tokens, grant
        self.picks: list[tuple[Request, int, int]] = []
        self.taken: set[Request] = set()
        self.experts: frozenset[int] = frozenset()
        self.worth = 0.0


class View:
    """What could run next: each request's next token to compute, and the decoding ones by expert.

    at: by age. number: of the batch that is formed next. patience: batches after which a request is urgent.
    missing_bytes: of these experts' weights, what is not on the device; none: nothing is missing.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        limits: Limits,
        number: int = 0,
        patience: float = math.inf,
        cost: Cost | None = None,
        missing_bytes: Callable[[frozenset[int]], float] | None = None,
    ):
        self.limits, self.number, self.patience = limits, number, patience
        self.cost, self.missing_bytes = cost, missing_bytes
        self.at: dict[Request, int] = {}
        self.decodes: dict[int, list[Request]] = {}
        self.prefills: dict[Request, None] = {}
        self.held: frozenset[int] = frozenset()  # experts of the batch before, where that is imagined
        self._served: set[Request] = set()  # taken, and still here with the rest of a prompt
        self._prices: dict[frozenset[int], float] = {}
        self._growth: dict[Request, tuple[int, list[tuple[int, frozenset[int]]]]] = {}
        for request in requests:
            start = request.computed + request.flying
            left = len(request.tokens) - start
            if left > 0:
                self.at[request] = start
                if left > 1:
                    self.prefills[request] = None
                else:
                    expert = request.experts[start]
                    if expert in self.decodes:
                        self.decodes[expert].append(request)
                    else:
                        self.decodes[expert] = [request]
        self._waited = iter(sorted(self.at, key=operator.attrgetter("since")) if patience < math.inf else ())
        self._next_waited = next(self._waited, None)

    def remove(self, request: Request) -> None:
        """It cannot run after all, or has nothing left to run."""
        start = self.at.pop(request, None)
        if start is not None and request in self.prefills:
            del self.prefills[request]
        elif start is not None:
            self.decodes[request.experts[start]].remove(request)

    def take(self, draft: Draft, request: Request, most: int = sys.maxsize, *, urgent: bool = False) -> None:
        """Put the next tokens of a request into the batch, `most` at most; out of the view if there is no room."""
        start = self.at[request]
        left = len(request.tokens) - start
        count = min(left, self.limits.chunk, draft.tokens, most)
        if draft.grant and not draft.grant(request, start + count, urgent):
            self.remove(request)
            return
        draft.picks.append((request, start, count))
        draft.taken.add(request)
        draft.requests -= 1
        draft.tokens -= count
        draft.worth += count / min(left, self.limits.chunk)
        if count == 1:
            draft.experts |= only(request.experts[start])
        else:
            draft.experts |= frozenset(request.experts[start : start + count])
        if count == left:
            self.remove(request)
        else:
            self.at[request] = start + count
            self._served.add(request)

    def take_urgent(self, draft: Draft) -> None:
        """Those passed over more often than `patience` allows, the longest wait first."""
        while (request := self._next_waited) and self.number - request.since > self.patience:
            if not draft.requests or not draft.tokens:
                return
            self._next_waited = next(self._waited, None)
            if request in self.at and request not in self._served:
                self.take(draft, request, urgent=True)

    def chunks(self, request: Request) -> list[tuple[int, frozenset[int]]]:
        """`growth` along the next chunk of a request."""
        start = self.at[request]
        known = self._growth.get(request)
        if known is None or known[0] != start:
            end = min(len(request.tokens), start + self.limits.chunk)
            known = self._growth[request] = start, growth(request.experts, start, end)
        return known[1]

    def price(self, experts: frozenset[int]) -> float:
        """Bytes read, or time for as many, of a step with these experts."""
        price = self._prices.get(experts)
        if price is None:
            assert self.cost is not None
            price = self.cost.fixed_bytes + self.cost.read_bytes(experts)
            absent = experts - self.held
            if self.missing_bytes and absent:
                price += self.cost.load * self.missing_bytes(absent)
            self._prices[experts] = price
        return price

    def close(self, draft: Draft) -> None:
        """The batch is done: what comes next is the one after it."""
        self.number += 1
        self.held = draft.experts
        self._prices.clear()


def _take_all(view: View, draft: Draft, requests: Iterable[Request]) -> None:
    for request in requests:
        if not draft.requests or not draft.tokens:
            return
        if request in view.at and request not in draft.taken:
            view.take(draft, request)


def fcfs(view: View, draft: Draft) -> None:
    """Oldest request first, prompt or not."""
    _take_all(view, draft, list(view.at))


def decode_first(view: View, draft: Draft) -> None:
    """Those that decode, oldest first; prompts fill up what is left."""
    _take_all(view, draft, [request for request in view.at if request not in view.prefills])
    _take_all(view, draft, list(view.prefills))


def prefill_first(view: View, draft: Draft) -> None:
    """Prompts, oldest first; those that decode fill up what is left."""
    _take_all(view, draft, list(view.prefills))
    _take_all(view, draft, [request for request in view.at if request not in view.prefills])


def longest_queue(view: View, draft: Draft) -> None:
    """The paper's Algorithm 1, mended: the queue with most tokens gives what fits, until the batch is full.

    A queue holds those whose next tokens take the same experts: one expert when decoding, the set of its next chunk
    for a prompt, which attention forbids to split by expert. Without `max_wait` an expert that few ask for starves.
    """
    view.take_urgent(draft)
    queues: dict[frozenset[int], list[Request]] = {}
    tokens: dict[frozenset[int], int] = {}
    for expert, requests in view.decodes.items():
        queues[only(expert)], tokens[only(expert)] = list(requests), len(requests)
    for request in view.prefills:
        if request not in draft.taken:
            count, experts = view.chunks(request)[-1]
            queues.setdefault(experts, []).append(request)
            tokens[experts] = tokens.get(experts, 0) + count
    for experts in sorted(queues, key=tokens.__getitem__, reverse=True):
        _take_all(view, draft, queues[experts])


def expert_aware(view: View, draft: Draft) -> None:
    """Ours: what lowers the step's price per request most joins it, until nothing lowers it.

    Price: bytes to read, and bytes to load as many times as the link is slower (`Cost`). A queue of one expert joins as
    a whole; a prompt's chunk may end before any token at which its set of experts grows. What asks only for experts
    that are in already is free, so it always joins. Those passed over too often come first whatever they cost.
    """
    view.take_urgent(draft)
    limits = view.limits
    while draft.requests and draft.tokens:
        best = view.price(draft.experts) / draft.worth if draft.worth else math.inf
        chosen: tuple[list[Request], int] | None = None
        for expert, queue in view.decodes.items():
            if queue:
                worth = draft.worth + min(len(queue), draft.requests, draft.tokens)
                score = view.price(draft.experts | only(expert)) / worth
                if score < best:
                    best, chosen = score, (queue, 1)
        prompts = (request for request in view.prefills if request not in draft.taken)
        for request in itertools.islice(prompts, PROMPTS):
            whole = min(len(request.tokens) - view.at[request], limits.chunk)
            for count, experts in view.chunks(request):
                count = min(count, draft.tokens)
                score = view.price(draft.experts | experts) / (draft.worth + count / whole)
                if score < best:
                    best, chosen = score, ([request], count)
                if count == draft.tokens:
                    break
        if chosen is None:
            return
        for request in chosen[0][: draft.requests]:
            if draft.tokens and request in view.at:  # else: out of tokens, or sent away for another's pages
                view.take(draft, request, chosen[1])


POLICIES: dict[str, Callable[[View, Draft], None]] = {
    "fcfs": fcfs,
    "decode-first": decode_first,
    "prefill-first": prefill_first,
    "longest-queue": longest_queue,
    "expert-aware": expert_aware,
}
