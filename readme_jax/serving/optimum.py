"""Fewest loads of an executed order of reads: Belady's MIN, the bound that policies are measured against."""

import heapq
from collections.abc import Sequence

import numpy as np

from readme_jax.config import require


def fewest_loads(accesses: Sequence[np.ndarray], slots: int) -> int:
    """Loads that no policy can do without.

    accesses: item ids of each read in the order of execution (`Residency.accesses`): the items of one read must be
    resident together. slots: items that fit; the pool starts empty. For every missing item the resident one that is
    read again last, and not by this read, is evicted: optimal since all items are of one size (Belady 1966), also where
    several are read at once. Nothing is loaded past the pool. ConfigError for a read that does not fit.
    """
    sizes = [len(read) for read in accesses]
    require(max(sizes, default=0) <= slots, f"slots={slots} must hold the widest read, {max(sizes, default=0)} items")
    if not sum(sizes):
        return 0
    ids = np.concatenate(accesses)
    when = np.repeat(np.arange(len(sizes)), sizes)
    # Sorted by item, then time: the next use of an entry is the time of its right neighbour of the same item.
    order = np.lexsort((when, ids))
    again = np.full(len(ids), len(sizes))
    same = ids[order][1:] == ids[order][:-1]
    again[order[:-1][same]] = when[order][1:][same]
    ids, again = ids.tolist(), again.tolist()
    next_use: dict[int, int] = {}  # of resident items
    heap: list[tuple[int, int]] = []  # (-next use, item), entries of earlier uses among them
    loads, start = 0, 0
    for size in sizes:
        stop = start + size
        lacking = 0
        for i in range(start, stop):
            item = ids[i]
            lacking += item not in next_use
            next_use[item] = again[i]
        loads += lacking
        # this read's new entries are pushed after its evictions: it cannot evict its own
        while len(next_use) > slots:
            use, item = heapq.heappop(heap)
            if next_use.get(item) == -use:
                del next_use[item]
        for i in range(start, stop):
            heapq.heappush(heap, (-again[i], ids[i]))
        start = stop
    return loads
