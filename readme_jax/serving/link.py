"""Transfers of expert pages to the device: what a load is, a link on a virtual clock, and the best it could do.

A link, virtual or real, has three calls. `issue(loads, now)`: these pages are committed, move them as soon as their
slots are free, earliest deadline first. `freed(n, now)`: pass n has run, the slots that it was the last to read may be
overwritten. `ready(n, now)`: when everything that pass n waits for has arrived.

Passes are what `residency.StepPlan` counts, over all steps: a layer, or a wave of one. Deadlines are compared by that
count, because the pass that runs first needs its pages first, whatever the clock says. Only steps whose batch is
committed are issued, so no byte is moved on a guess.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from readme_jax.config import require

FREE = -1  # of `Load.after`: the slots are free already


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Pages of one pass that travel as one transfer.

    due: the pass that reads them first, their deadline. size: bytes. after: the last pass that reads what lies in the
    slots now, after which they may be overwritten; FREE: at once. items, slots: int32 [N], ids of the pages and where
    they go.
    """

    due: int
    size: int
    after: int = FREE
    items: Sequence[int] | np.ndarray = ()
    slots: Sequence[int] | np.ndarray = ()


def batched(due: int, items: np.ndarray, slots: np.ndarray, after: np.ndarray, page_bytes: int) -> list[Load]:
    """The loads of one pass, neighbours that wait for the same pass together.

    items, slots int32 [N], after int64 [N] (`StepPlan.loads_of`), in the order in which they must be carried out, which
    is kept.
    """
    waits = after.tolist()
    bounds = [0, *[i for i in range(1, len(waits)) if waits[i] != waits[i - 1]], len(waits)]
    return [
        Load(due, (end - begin) * page_bytes, waits[begin], items[begin:end], slots[begin:end])
        for begin, end in zip(bounds, bounds[1:])
        if begin < end
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A load, or part of one, that was carried out: when it might have begun, when it began and ended, in seconds."""

    load: Load
    released: float
    start: float
    end: float
    size: int


class VirtualLink:
    """One transfer at a time: a latency, then bytes at a bandwidth.

    Of the loads that are released (issued, and their slots free) the one with the earliest deadline goes first. A load
    moves in parts of `part` bytes: what has an earlier deadline goes between two of them, never within one. The clock
    is the caller's: times passed in must not go back. busy: seconds under way, moved: bytes, count: transfers.
    """

    def __init__(self, bandwidth: float, latency: float = 0.0, *, part: int = 1 << 62, keep: bool = False):
        """bandwidth bytes/s. latency s a transfer. keep: remember every `Transfer` (for timelines) in `transfers`."""
        require(bandwidth > 0, f"bandwidth={bandwidth} must be positive")
        require(latency >= 0, f"latency={latency} must not be negative")
        require(part >= 1, f"part={part} must be at least 1")
        self.bandwidth, self.latency, self.part = bandwidth, latency, part
        self.busy, self.moved, self.count = 0.0, 0, 0
        self.transfers: list[Transfer] | None = [] if keep else None
        self._clear = 0.0  # when the transfer under way ends
        self._number = itertools.count()  # equal deadlines in the order of issue
        self._held: dict[int, list[Load]] = {}  # by the pass they wait for
        self._coming: list[tuple[float, int, int, Load]] = []  # heap by release
        self._released: list[tuple[int, int, float, Load]] = []  # heap by deadline
        self._open: dict[int, int] = {}  # loads of a pass that have not begun
        self._arrival: dict[int, float] = {}
        self._done = -1  # the last pass that has run
        self._last = -1  # number of the load that moved last: going on with it costs no latency
        self._left: dict[int, int] = {}  # bytes left of loads that were cut, by number

    def seconds(self, size: int) -> float:
        """What a transfer of `size` bytes takes."""
        return self.latency + size / self.bandwidth

    def issue(self, loads: Iterable[Load], now: float) -> None:
        """Commit loads at time `now`. Their pass must not have run."""
        self._run(now)
        for load in loads:
            assert load.due > self._done, f"a load for pass {load.due} comes after pass {self._done} has run"
            self._open[load.due] = self._open.get(load.due, 0) + 1
            if load.after > self._done:
                assert load.after < load.due, f"pass {load.due} waits for a slot that {load.after} still reads"
                self._held.setdefault(load.after, []).append(load)
            else:
                self._release(load, now)

    def freed(self, number: int, now: float) -> None:
        """Pass `number` has run at time `now`. Passes run in order."""
        assert number > self._done, f"pass {number} runs after {self._done}"
        self._done = number
        self._arrival.pop(number, None)
        for load in self._held.pop(number, ()):
            self._release(load, now)

    def ready(self, number: int, now: float) -> float:
        """When the last page of pass `number` is there, at least `now`; the link works on until then."""
        while self._open.get(number, 0):
            self._next()
        self._open.pop(number, None)
        return max(now, self._arrival.get(number, now))

    def _release(self, load: Load, now: float) -> None:
        heapq.heappush(self._coming, (now, load.due, next(self._number), load))

    def _run(self, until: float) -> None:
        """Begin every transfer that begins before `until`."""
        while self._begins() < until:
            self._next(until)

    def _begins(self) -> float:
        """When the next transfer begins, as far as is known."""
        if self._released:
            return self._clear
        return max(self._clear, self._coming[0][0]) if self._coming else float("inf")

    def _next(self, until: float = float("inf")) -> None:
        """Move the most urgent load, up to the first end of a part at or after `until`, or after another's release."""
        start = self._begins()
        while self._coming and self._coming[0][0] <= start:
            released, due, number, load = heapq.heappop(self._coming)
            heapq.heappush(self._released, (due, number, released, load))
        due, number, released, load = self._released[0]
        size = left = self._left.get(number, load.size)
        begun = start + (0.0 if number == self._last else self.latency)
        until = min(until, self._coming[0][0]) if self._coming else until
        if left > self.part and begun + left / self.bandwidth > until:
            size = min(left, self.part * max(1, math.ceil((until - begun) * self.bandwidth / self.part)))
        self._clear, self._last = begun + size / self.bandwidth, number
        if size < left:
            self._left[number] = left - size
        else:
            heapq.heappop(self._released)
            self._left.pop(number, None)
            self._open[due] -= 1
            self._arrival[due] = self._clear
        self.busy, self.moved, self.count = self.busy + self._clear - start, self.moved + size, self.count + 1
        if self.transfers is not None:
            self.transfers.append(Transfer(load, released, start, self._clear, size))


# ---- the best that any link could do --------------------------------------------------------------


class Optimum:
    """The same steps and loads under an offline earliest-deadline-first schedule: the least stall there can be.

    Here a transfer may be interrupted at any moment and taken up again, and the link never rests while a load is
    released. Priorities are program order, so lower ones never delay higher ones: the loads of the first k passes are
    there at the earliest moment that any schedule of one link reaches, for every k at once; hence every pass starts as
    early as it can, and slots are freed as early. What stalls here stalls under any order of the same transfers.

    Fed step by step, with what was decided when; memory does not grow. stall, end: seconds.
    """

    def __init__(self):
        self.stall, self.end = 0.0, 0.0
        self._begins: dict[int, float] = {}  # of the last steps' passes, when compute was free for them
        self._ends: dict[int, float] = {}
        self._gaps = [(0.0, float("inf"))]  # when the link is idle, in order

    def step(
        self,
        first: int,
        decided: float | int,
        seconds: Sequence[float],
        loads: Sequence[Sequence[tuple[int, float]]],
        tail: float = 0.0,
    ) -> None:
        """One step, its passes counted from `first`: compute seconds and loads (after, seconds) of each.

        tail: seconds of compute behind the last pass. decided: when its batch was committed, in seconds (float); or the
        pass (int) that was about to begin then.
        """
        moment = decided if isinstance(decided, float) else self._begins[decided]
        self._forget(moment, first)
        clock = max(self.end, moment)
        for number, (compute, wanted) in enumerate(zip(seconds, loads, strict=True), first):
            self._begins[number] = there = clock
            for after, took in wanted:
                there = max(there, self._take(max(moment, self._ends.get(after, 0.0)), took))
            self.stall += there - clock
            self._ends[number] = clock = there + compute
        self.end = clock + tail

    def _forget(self, moment: float, first: int) -> None:
        """Drop what no later step can ask for: decisions do not go back in time, nor beyond the step before."""
        self._gaps = [(max(a, moment), b) for a, b in self._gaps if b > moment]
        if len(self._ends) > 4096:
            self._ends = {n: end for n, end in self._ends.items() if end > moment}
            self._begins = {n: begin for n, begin in self._begins.items() if begin >= moment}

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
    return max(0.0, busy - stall) / (busy - least_stall) if busy > least_stall else 1.0
