"""Segments of a step on a mesh, and the sizes that are compiled: each device has rows of its own. NumPy only."""

import dataclasses
from collections.abc import Sequence

from readme_jax.serving import segments
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import Work


def grid(limits: Limits, context: int, page: int) -> segments.Grid:
    """Shapes that are compiled, of one device: rows are 1, a quarter of the largest batch or all of it, since requests
    may all lie on one device; pieces of prompts as on one device."""
    rungs = {1, -(-limits.batch_requests // 4), limits.batch_requests}
    return dataclasses.replace(segments.grid(limits, context, page), rungs=tuple(sorted(rungs)))


def sizes(b: int, t: int, peers: int) -> tuple[int, ...]:
    """Rows S that a device sends to each peer, ascending, for a segment of b rows of t tokens on each device.

    What a balanced router needs (see `routing.ladder`) and all tokens of a device, for no skew may drop one; pieces of
    prompts, which often keep to few experts, have a size between.
    """
    tokens = b * t
    mean = tokens / peers
    low = min(tokens, -(-int(mean + 2.4 * mean**0.5 + 1) // 2) * 2)
    middle = {-(-(low + tokens) // 4) * 2} if t > 1 else set()
    return tuple(sorted({low, tokens} | {size for size in middle if low < size < tokens}))


def cut(g: segments.Grid, works: Sequence[Work], devices: int) -> list[tuple[tuple[int, int], list[list[int]]]]:
    """(shape, for each device its places in the batch) of the segments of a batch: all single tokens together, and
    pieces of prompts one a device at a time."""
    single: list[list[int]] = [[] for _ in range(devices)]
    pieces: list[list[int]] = [[] for _ in range(devices)]
    for i, work in enumerate(works):
        (single if work.count == 1 else pieces)[work.request.device].append(i)
    out = []
    most = max(map(len, single))
    if most:
        out.append(((next(b for b in g.rungs if b >= most), 1), single))
    for turn in range(max(map(len, pieces))):
        places = [mine[turn : turn + 1] for mine in pieces]
        out.append(((1, g.fit(max(works[i].count for mine in places for i in mine))), places))
    return out
