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
    held: set[int] = set()
    heap: list[tuple[int, int]] = []  # (-next use, item); entries of uses that are past stand behind all others
    loads, start = 0, 0
    for size in sizes:
        stop = start + size
        read = ids[start:stop]
        loads += size - len(held.intersection(read))
        held.update(read)
        # entries of this read are pushed after its evictions: it cannot evict its own
        while len(held) > slots:
            held.discard(heapq.heappop(heap)[1])
        for item, use in zip(read, again[start:stop]):
            heapq.heappush(heap, (-use, item))
        start = stop
    return loads
