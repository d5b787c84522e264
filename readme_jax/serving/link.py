"""Transfers of expert pages from host to device: what a load is, a virtual link on a virtual clock, and the best there is.

A link, virtual or real, has three calls. `issue(loads, now)`: these pages are committed, move them as soon as their
slots are free, earliest deadline first. `freed(key, now)`: the layer `key` has run, the slots that it read last may be
overwritten. `ready(key, now)`: when everything that the layer `key` waits for has arrived.

A key is (step, layer), program order: deadlines are compared by it, because the layer that runs first needs its pages
first, whatever the clock says. Only steps whose batch is committed are issued, so no byte is moved on a guess.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from readme_jax.config import require

Key = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Pages of one layer that travel as one transfer.

    key: the (step, layer) that reads them first, their deadline. size: bytes. after: the last (step, layer) that reads
    what lies in the slots now, before which they must not be overwritten; None: they are free. items, slots: int32 [N],
    ids of the pages and where they go.
    """

    key: Key
    size: int
    after: Key | None = None
    items: Sequence[int] | np.ndarray = ()
    slots: Sequence[int] | np.ndarray = ()


def batched(
    key: Key,
    items: np.ndarray,
    slots: np.ndarray,
    after: Sequence[Key | None],
    *,
    page_bytes: int,
    most: int,
) -> list[Load]:
    """The loads of one layer as transfers: neighbours that wait for the same layer together, at most `most` bytes each.

    items, slots int32 [N], after [N], in the order in which they must be carried out, which is kept. A page larger than
    `most` travels alone.
    """
    limit, loads, begin = max(1, most // page_bytes), [], 0
    for end in range(1, len(items) + 1):
        if end == len(items) or end - begin == limit or after[end] != after[begin]:
            part = slice(begin, end)
            loads.append(Load(key, (end - begin) * page_bytes, after[begin], items[part], slots[part]))
            begin = end
    return loads


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A load that was carried out: when it might have begun, when it did, when it was there. Seconds."""

    load: Load
    released: float
    start: float
    end: float


class VirtualLink:
    """One transfer at a time: a latency, then bytes at a bandwidth. Preemption only between transfers.

    Of the loads that are released (issued, and their slots free) the one with the earliest deadline goes first. The
    clock is the caller's: times passed in must not go back. busy: seconds under way, moved: bytes, count: transfers.
    """

    def __init__(self, bandwidth: float, latency: float = 0.0, *, keep: bool = False):
        """bandwidth bytes/s. latency s a transfer. keep: remember every `Transfer` (for timelines) in `transfers`."""
        require(bandwidth > 0, f"bandwidth={bandwidth} must be positive")
        require(latency >= 0, f"latency={latency} must not be negative")
        self.bandwidth, self.latency = bandwidth, latency
        self.busy, self.moved, self.count = 0.0, 0, 0
        self.transfers: list[Transfer] | None = [] if keep else None
        self._clear = 0.0  # when the transfer under way ends
        self._number = itertools.count()  # equal deadlines in the order of issue
        self._held: dict[Key, list[Load]] = {}  # by the layer they wait for
        self._coming: list[tuple[float, Key, int, Load]] = []  # heap by release
        self._released: list[tuple[Key, int, float, Load]] = []  # heap by deadline
        self._open: dict[Key, int] = {}  # loads of a layer that have not begun
        self._arrival: dict[Key, float] = {}
        self._done: Key = (-1, -1)

    def seconds(self, size: int) -> float:
        """What a transfer of `size` bytes takes."""
        return self.latency + size / self.bandwidth

    def issue(self, loads: Iterable[Load], now: float) -> None:
        """Commit loads at time `now`. Their layer must not have run."""
        self._run(now)
        for load in loads:
            assert load.key > self._done, f"a load for layer {load.key} comes after layer {self._done} has run"
            self._open[load.key] = self._open.get(load.key, 0) + 1
            if load.after is not None and load.after > self._done:
                assert load.after < load.key, f"layer {load.key} waits for a slot that {load.after} still reads"
                self._held.setdefault(load.after, []).append(load)
            else:
                self._release(load, now)

    def freed(self, key: Key, now: float) -> None:
        """The layer `key` has run at time `now`. Layers run in program order."""
        assert key > self._done, f"layer {key} runs after {self._done}"
        self._done = key
        self._arrival.pop(key, None)
        for load in self._held.pop(key, ()):
            self._release(load, now)

    def ready(self, key: Key, now: float) -> float:
        """When the last page of the layer `key` is there, at least `now`; the link works on until then."""
        while self._open.get(key, 0):
            self._next()
        self._open.pop(key, None)
        return max(now, self._arrival.get(key, now))

    def _release(self, load: Load, now: float) -> None:
        heapq.heappush(self._coming, (now, load.key, next(self._number), load))

    def _run(self, until: float) -> None:
        """Begin every transfer that begins before `until`."""
        while self._begins() < until:
            self._next()

    def _begins(self) -> float:
        """When the next transfer begins, as far as is known."""
        if self._released:
            return self._clear
        return max(self._clear, self._coming[0][0]) if self._coming else float("inf")

    def _next(self) -> None:
        """Carry out one transfer."""
        start = self._begins()
        while self._coming and self._coming[0][0] <= start:
            released, key, number, load = heapq.heappop(self._coming)
            heapq.heappush(self._released, (key, number, released, load))
        key, _, released, load = heapq.heappop(self._released)
        took = self.seconds(load.size)
        self._clear = start + took
        self._open[key] -= 1
        self._arrival[key] = self._clear
        self.busy, self.moved, self.count = self.busy + took, self.moved + load.size, self.count + 1
        if self.transfers is not None:
            self.transfers.append(Transfer(load, released, start, self._clear))


# ---- the best that any link could do --------------------------------------------------------------


class Optimum:
    """The same steps and loads under an offline earliest-deadline-first schedule: the least stall there can be.

    Here a transfer may be interrupted at any moment and taken up again, and the link never rests while a load is
    released. Priorities are program order, so lower ones never delay higher ones: the loads of the first k layers are
    there at the earliest moment that any schedule of one link reaches, for every k at once; hence every layer starts
    as early as it can, and slots are freed as early. What stalls here stalls under any order of the same transfers.

    Fed step by step, with what was decided when; memory does not grow. stall, end: seconds.
    """

    def __init__(self):
        self.stall, self.end, self._number = 0.0, 0.0, -1
        self._ends: dict[Key, float] = {}  # of the last steps' layers
        self._starts: dict[int, float] = {}
        self._gaps: list[tuple[float, float]] = []  # when the link is idle, in order; the last one has no end
        self._gaps.append((0.0, float("inf")))

    def step(self, number: int, decided: float | Key, seconds: Sequence[float], loads: Sequence[Sequence]) -> None:
        """One step: compute seconds and loads (after, seconds) of each layer.

        decided: when its batch was committed; a key (step, layer): as that layer began.
        """
        moment = decided if isinstance(decided, float) else self._begin_of(decided)
        self._forget(moment)
        clock = max(self.end, moment)
        self._starts[number] = clock
        for layer, (compute, wanted) in enumerate(zip(seconds, loads, strict=True)):
            there = clock
            for after, took in wanted:
                there = max(there, self._take(max(moment, self._ends.get(after, 0.0)), took))
            self.stall += there - clock
            clock = there + compute
            self._ends[number, layer] = clock
        self.end, self._number = clock, number

    def _begin_of(self, key: Key) -> float:
        step, layer = key
        return self._starts[step] if layer == 0 else self._ends[step, layer - 1]

    def _forget(self, moment: float) -> None:
        """Drop what no later step can ask for: decisions do not go back in time."""
        for step in [s for s in self._starts if s < self._number]:
            del self._starts[step]
        if len(self._ends) > 1024:
            self._ends = {key: end for key, end in self._ends.items() if key[0] >= self._number - 1}
        self._gaps = [(max(a, moment), b) for a, b in self._gaps if b > moment]

    def _take(self, release: float, took: float) -> float:
        """Use the link for `took` seconds from `release` on, in the gaps that earlier deadlines leave; when it ends."""
        kept, end = [], release
        for i, (a, b) in enumerate(self._gaps):
            begin = max(a, release)
            if begin >= b:
                kept.append((a, b))
                continue
            used = min(took, b - begin)
            took, end = took - used, begin + used
            kept += [part for part in ((a, begin), (end, b)) if part[0] < part[1]]
            if took <= 0:
                kept += self._gaps[i + 1 :]
                break
        self._gaps = kept
        return end


def hidden_share(busy: float, stall: float, least_stall: float) -> float:
    """Transfer time that ran under compute, over what could have: (busy - stall) / (busy - least stall); 1 of nothing.

    busy: seconds that the link was under way. stall: seconds that compute waited for it. least_stall: `Optimum.stall`.
    """
    return (busy - stall) / (busy - least_stall) if busy > least_stall else 1.0
