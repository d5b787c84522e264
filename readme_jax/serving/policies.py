"""Which of the requests that could run make up a batch: fcfs, decode-first, prefill-first, longest-queue, expert-aware.

A policy is a function of a `View` (what could run) and a `Draft` (the batch so far). It knows nothing of time or of the
device, so the same function also tells what the batches after this one would be.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from readme_jax.config import require
from readme_jax.serving.request import Request

Policy = Literal["fcfs", "decode-first", "prefill-first", "longest-queue", "expert-aware"]

_SINCE = operator.attrgetter("since")
PART = 0.25  # share of a chunk that must do with the experts of a batch for it to be cut
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
    max_wait: float | None = 12.0
    """Batches that longest-queue and expert-aware may pass over a request that could run, as a multiple of live
    requests / batch_requests, which is what strict turns cost (1: strict turns); none: no bound, as in the paper."""

    def __post_init__(self):
        for name in ("batch_requests", "batch_tokens", "chunk", "max_live"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("batch_requests", "chunk"):
            value = getattr(self, name)
            require(value <= self.batch_tokens, f"{name}={value} must be at most batch_tokens={self.batch_tokens}")
        good = self.max_wait is None or self.max_wait >= 1
        require(good, f"max_wait={self.max_wait} must be at least 1, or none")

    def patience(self, live: int) -> float:
        """Batches after which a request is urgent. Strict turns from then on keep `max_wait`.

        That is exact for requests that decode. Prompts need room for a chunk besides: a batch takes batch_tokens //
        chunk urgent ones, which may be fewer than batch_requests.
        """
        return math.inf if self.max_wait is None else (self.max_wait - 1) * live / self.batch_requests


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


@functools.lru_cache(1 << 14)
def members(mask: int) -> frozenset[int]:
    """The experts of a bit mask, which is what sets of experts are in here: bit e for expert e."""
    return frozenset(expert for expert in range(mask.bit_length()) if mask >> expert & 1)


Growth = list[tuple[int, int]]


def growth(experts: list[int], start: int, end: int) -> Growth:
    """How the set of experts grows along experts[start:end]: (tokens that do with this set, set), smallest first."""
    firsts = sorted([(experts.index(expert, start, end), expert) for expert in set(experts[start:end])])
    grown, mask = [], 0
    for first, expert in firsts:
        if mask:
            grown.append((first - start, mask))
        mask |= 1 << expert
    grown.append((end - start, mask))
    return grown


def age(request: Request) -> tuple[float, int]:
    """What requests are ordered by, oldest first."""
    return request.arrival, request.number


class Draft:
    """A batch in the making: picks (request, start, count), the room left, the experts so far (a mask).

    worth: requests brought forward, a part of a chunk counting as its share. grant(request, end, urgent): finds room
    for the keys and values of tokens before `end`; none where a batch is only imagined.
    """

    def __init__(self, limits: Limits, grant: Callable[[Request, int, bool], bool] | None = None):
        self.requests, self.tokens, self.grant = limits.batch_requests, limits.batch_tokens, grant
        self.picks: list[tuple[Request, int, int]] = []
        self.taken: set[Request] = set()
        self.experts = 0
        self.worth = 0.0


class View:
    """What could run next: each request's next token to compute, and the decoding ones by expert.

    at: by age. number: of the batch that is formed next. patience: batches after which a request is urgent, see Limits.
    missing_bytes: of these experts' weights, what is not on the device; none: nothing is missing. chunks: start of the
    next chunk of prompts and `growth` along it, kept from view to view. flying: whether a batch is on the device, whose
    requests will be back soon.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        limits: Limits,
        number: int = 0,
        patience: float = math.inf,
        cost: Cost | None = None,
        missing_bytes: Callable[[frozenset[int]], float] | None = None,
        chunks: dict[Request, tuple[int, Growth]] | None = None,
        flying: bool = False,
    ):
        self.limits, self.number, self.patience = limits, number, patience
        self.cost, self.missing_bytes = cost, missing_bytes
        self.at: dict[Request, int] = {}
        self.decodes: dict[int, list[Request]] = {}
        self.prefills: dict[Request, None] = {}
        self.flying = flying
        self.held = 0  # experts of the batch before, where that is imagined
        self._since: dict[Request, int] = {}  # of those taken that are still here with the rest of a prompt
        self._prices: dict[int, float] = {}
        self._chunks = {} if chunks is None else chunks
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
        self._waited = deque(sorted(self.at, key=_SINCE) if patience < math.inf else ())  # the longest wait first
        self._again: deque[Request] = deque()  # of _since, in order; all later than _waited

    def since(self, request: Request) -> int:
        """Number of the batch that could have taken it first."""
        return self._since.get(request, request.since)

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
        if left == 1:
            draft.experts |= 1 << request.experts[start]
        else:
            draft.experts |= next(experts for stop, experts in self.chunks(request) if count <= stop)
        if count == left:
            self.remove(request)
        else:
            self.at[request] = start + count
            self._since[request] = self.number + 1

    def take_urgent(self, draft: Draft) -> None:
        """Those passed over as often as `patience` allows, the longest wait first."""
        for line in (self._waited, self._again):
            while line and draft.requests and draft.tokens:
                request = line[0]
                gone = request not in self.at or (request in self._since) != (line is self._again)
                if not gone and self.number - self.since(request) < self.patience:
                    return
                line.popleft()
                if not gone:
                    self.take(draft, request, urgent=True)

    def chunks(self, request: Request) -> Growth:
        """`growth` along the next chunk of a request."""
        start = self.at[request]
        known = self._chunks.get(request)
        if known is None or known[0] != start:
            end = min(len(request.tokens), start + self.limits.chunk)
            known = self._chunks[request] = start, growth(request.experts, start, end)
        return known[1]

    def price(self, experts: int) -> float:
        """Bytes read, or time for as many, of a step with these experts."""
        price = self._prices.get(experts)
        if price is None:
            price = self._prices[experts] = self._run(experts) + self._load(experts)
        return price

    def stalls(self, experts: int) -> bool:
        """Whether a step with these experts would wait for their loads for longer than it runs."""
        return self._load(experts) > self._run(experts)

    def _run(self, experts: int) -> float:
        assert self.cost is not None
        return self.cost.fixed_bytes + self.cost.read_bytes(members(experts))

    def _load(self, experts: int) -> float:
        absent = experts & ~self.held
        if not self.missing_bytes or not absent:
            return 0.0
        assert self.cost is not None
        return self.cost.load * self.missing_bytes(members(absent))

    def close(self, draft: Draft) -> None:
        """The batch is done: what comes next is the one after it."""
        self.number += 1
        self.flying = False
        self.held = draft.experts
        self._prices.clear()
        for request in sorted(draft.taken & self.at.keys(), key=age):
            if request in self._again:
                self._again.remove(request)
            self._again.append(request)
            start = self.at[request]
            if len(request.tokens) - start == 1:  # the last token of a prompt is nothing else than a decoding step
                del self.prefills[request]
                bisect.insort(self.decodes.setdefault(request.experts[start], []), request, key=age)

    def expect(self, live: Iterable[Request]) -> None:
        """For batches that are only imagined: who is on the device comes back once, with a token of the same expert.

        Tokens keep their expert more often than they take any other. Where they do not, a page stays that had better
        gone, which can cost a load. live: by age.
        """
        live = list(live)
        back = [
            request
            for request in live
            if request.flying and not request.left and request.generated + 1 < request.sampling.max_new_tokens
        ]
        for request in back:
            self.at[request] = last = len(request.tokens) - 1
            self._since[request] = self.number
            bisect.insort(self.decodes.setdefault(request.experts[last], []), request, key=age)
        self.at = {request: self.at[request] for request in live if request in self.at}
        self._again = deque(sorted([*self._again, *back], key=age))


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
    queues = {1 << expert: list(requests) for expert, requests in view.decodes.items() if requests}
    tokens = {experts: len(requests) for experts, requests in queues.items()}
    for request in view.prefills:
        if request not in draft.taken:
            count, experts = view.chunks(request)[-1]
            queues.setdefault(experts, []).append(request)
            tokens[experts] = tokens.get(experts, 0) + count
    for experts in sorted(queues, key=lambda experts: (-tokens[experts], age(queues[experts][0]))):
        _take_all(view, draft, queues[experts])


def expert_aware(view: View, draft: Draft) -> None:
    """Ours: the set of experts with the lowest price per request brought forward, grown while that lowers it further.

    Price: bytes to read, and bytes to load as many times as the link is slower (`Cost`). Sets weighed: those of the
    batch so far and one more expert, or one more prompt's next chunk. Whoever asks for nothing else comes with it, the
    longest wait first; a prompt whose chunk needs more is cut where its set grows, if a good part of it comes before.
    Those passed over too often come first whatever they cost. While a batch is on the device, none is formed that would
    stall: whoever comes back may go on with what is here.
    """
    view.take_urgent(draft)
    while draft.requests and draft.tokens:
        best = view.price(draft.experts) / draft.worth if draft.worth else math.inf
        queues = [(1 << expert, len(requests)) for expert, requests in view.decodes.items() if requests]
        waiting = (request for request in view.prefills if request not in draft.taken)
        prompts = [(request, *view.chunks(request)[-1]) for request in itertools.islice(waiting, PROMPTS)]
        chosen = None
        for more in sorted({expert for expert, _ in queues}.union([experts for _, _, experts in prompts])):
            experts = draft.experts | more
            worth, tokens = 0, draft.tokens
            for expert, count in queues:
                if experts & expert:
                    worth += count
            for _, count, asked in prompts:
                if asked | experts == experts and tokens > 0:
                    worth += 1
                    tokens -= count
            score = view.price(experts) / (draft.worth + min(worth, draft.requests))
            if score < best:
                best, chosen = score, experts
        if chosen is None or not draft.picks and view.flying and view.stalls(chosen):
            return
        _take_free(view, draft, chosen, [request for request, _, _ in prompts])


def _take_free(view: View, draft: Draft, experts: int, prompts: list[Request]) -> None:
    """Whoever asks for these experts only: whole chunks, those that decode, then parts of chunks."""
    parts = []
    for request in prompts:
        if request in view.at and draft.requests and draft.tokens:
            chunks = view.chunks(request)
            fits = max((count for count, asked in chunks if asked | experts == experts), default=0)
            if fits == chunks[-1][0]:
                view.take(draft, request)
            elif fits >= PART * chunks[-1][0]:
                parts.append((request, fits))
    decodes = [request for expert, queue in view.decodes.items() if experts >> expert & 1 for request in queue]
    # by age where they wait equally long: the order of queues is that in which experts were first asked for
    _take_all(view, draft, sorted(decodes, key=lambda request: (view.since(request), age(request))))
    for request, count in parts:
        if draft.requests and draft.tokens and request in view.at:
            view.take(draft, request, count)


POLICIES: dict[str, Callable[[View, Draft], None]] = {
    "fcfs": fcfs,
    "decode-first": decode_first,
    "prefill-first": prefill_first,
    "longest-queue": longest_queue,
    "expert-aware": expert_aware,
}
BOUNDED = ("longest-queue", "expert-aware")  # the policies that `Limits.max_wait` keeps from passing over for ever
