"""Choice of victims within one step, for `residency.Residency`. Pure Python and NumPy."""

import heapq
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np

Loads = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # one entry a load: place, slot, victim, free_at


def loads(place: np.ndarray, empty: list[int], slots: np.ndarray, victims: np.ndarray, free_at: np.ndarray) -> Loads:
    """Loads into `empty` slots, then into those of `victims`."""
    return (
        place,
        np.concatenate([np.array(empty, np.int32), slots]),
        np.concatenate([np.full(len(empty), -1, np.int32), victims]),
        np.concatenate([np.full(len(empty), -1, np.int64), free_at]),
    )


def farthest(
    absent: np.ndarray,
    empty: list[int],
    pool_K: np.ndarray,
    slots_K: np.ndarray,
    last_pass_K: np.ndarray,
    key_K: np.ndarray,
    groups: Sequence[int],
    pass_N: np.ndarray,
) -> Loads:
    """Loads of one step, group by group, each in place of the page with the largest key that is no longer needed.

    pool_K: items; the first N are those of the step, in order of their groups (group g is groups[g] : groups[g + 1]
    and needs all of its pages at once), the others are resident and not read by this step. absent: places among the N
    that are not resident. slots_K: their slots (-1: absent). last_pass_K: pass that read them last before this step.
    key_K: rank of the next use after this step. pass_N: pass of this step that reads each of the N. empty: slots to use
    first. A page of the step becomes a candidate once its group has run. Where no candidate is left, a page of the
    farthest later group goes (and is loaded again for it): every candidate's next use is later than that.
    """
    last = len(groups) - 1
    bounds = np.array([*groups, len(pool_K)])
    section_K = np.repeat(np.arange(last + 1), bounds[1:] - bounds[:-1])
    # by section, then the largest key first: keys are far below 2^50 and sections few
    sort_K = (section_K << 50) - key_K
    order = np.argsort(sort_K, kind="stable")
    # Pages of one section with one key form a run; a heap holds the next run of each section that is open.
    sort_K = sort_K[order]
    at = np.concatenate([[0], np.flatnonzero(sort_K[1:] != sort_K[:-1]) + 1])
    order_at = order[at]
    run_key, run_section = key_K[order_at].tolist(), section_K[order_at]
    first_run = np.searchsorted(run_section, np.arange(last + 2)).tolist()
    stop, at, order = [*at[1:].tolist(), len(order)], at.tolist(), order.tolist()
    slots, lacking = slots_K.tolist(), [[] for _ in range(last)]
    for place, group in zip(absent.tolist(), section_K[absent].tolist()):
        lacking[group].append(place)
    heap, late = [], len(pass_N) - 1
    if first_run[last] < first_run[last + 1]:
        heap.append((-run_key[first_run[last]], first_run[last], last))
    places, victims, early = [], [], []  # early: victims that this step has yet to read

    for group in range(last):
        todo, done = lacking[group], 0
        while done < len(todo):
            if empty:
                chosen = [-1]
                slots[todo[done]] = empty.pop(0)
            elif heap:
                _, run, section = heap[0]
                start = at[run]
                chosen = order[start : min(start + len(todo) - done, stop[run])]
                at[run] = start + len(chosen)
                if at[run] == stop[run]:
                    if run + 1 < first_run[section + 1]:
                        heapq.heapreplace(heap, (-run_key[run + 1], run + 1, section))
                    else:
                        heapq.heappop(heap)
                for place, victim in zip(todo[done:], chosen):
                    slots[place] = slots[victim]
            else:
                while slots[late] < 0:
                    late -= 1
                chosen = [late]
                slots[todo[done]], slots[late] = slots[late], -1
                lacking[int(section_K[late])].append(late)
                early.append(len(victims))
            places += todo[done : done + len(chosen)]
            victims += chosen
            done += len(chosen)
        first = first_run[group]
        if first < first_run[group + 1]:
            heapq.heappush(heap, (-run_key[first], first, group))
    place_M, victim_M = np.array(places), np.array(victims)
    free_at_M = np.concatenate([pass_N, last_pass_K[len(pass_N) :]])[victim_M]
    free_at_M[early] = last_pass_K[victim_M[early]]
    fresh_M = victim_M < 0
    free_at_M[fresh_M] = -1
    return place_M, np.array(slots, np.int32)[place_M], np.where(fresh_M, np.int32(-1), pool_K[victim_M]), free_at_M


class Order:
    """Resident pages ranked by what has been read: the policies lru, lfu and random. `slots` pages fit.

    lru: victim is the least recently read (of one pass, what was resident before what it loaded). lfu: read in the
    fewest passes since the start, resident or not; of equal ones the least recently read. random: any, uniformly. Never
    a page of the group that is being read.
    """

    def __init__(self, policy: Literal["lru", "lfu", "random"], items: int, slots: int, seed: int):
        self._policy, self._slots = policy, slots
        self._last: OrderedDict[int, int] = OrderedDict()  # resident item -> pass that read it last
        self._count = [0] * items
        self._heap: list[tuple[int, int, int]] = []  # lfu: (count, last pass, item) as they were when pushed
        self._pool: list[int] = []  # random: the resident items
        self._rng = random.Random(seed)

    def read(self, group: list[int], passes: list[int]) -> list[tuple[int, int, int]]:
        """Read a group that must be resident together; returns (place in group, victim, pass that read it last) of each
        load, -1 twice where there was room."""
        last, recent = self._last, self._policy == "lru"
        lacking = []
        for i, item in enumerate(group):
            if item in last:
                last[item] = passes[i]
                if recent:
                    last.move_to_end(item)
            else:
                lacking.append(i)
        if self._policy == "lfu":
            for item in group:
                self._count[item] += 1
        found, members, kept = [], set(group) if lacking else set(), []
        for i in lacking:
            if len(last) < self._slots:
                victim, when = -1, -1
            elif recent:
                victim, when = last.popitem(last=False)  # members stand at the other end
            else:
                victim = self._rarest(members, kept) if self._policy == "lfu" else self._drawn(members)
                when = last.pop(victim)
            found.append((i, victim, when))
            item = group[i]
            last[item] = passes[i]
            if self._policy == "lfu":
                heapq.heappush(self._heap, (self._count[item], passes[i], item))
            elif self._policy == "random":
                self._pool.append(item)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found

    def _rarest(self, members: set[int], kept: list[tuple[int, int, int]]) -> int:
        # Counts and passes only grow, so an entry that is out of date stands too early, never too late.
        while True:
            entry = self._heap[0]
            item = entry[2]
            now = (self._count[item], self._last[item], item)
            if entry != now:
                heapq.heapreplace(self._heap, now)
                continue
            heapq.heappop(self._heap)
            if item not in members:
                return item
            kept.append(entry)

    def _drawn(self, members: set[int]) -> int:
        pool = self._pool
        while True:
            i = int(self._rng.random() * len(pool))
            item = pool[i]
            if item not in members:
                pool[i] = pool[-1]
                pool.pop()
                return item
