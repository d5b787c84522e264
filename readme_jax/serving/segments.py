"""What a step of the runner uploads: a batch cut into segments of compiled shapes, as NumPy arrays, in one piece.

Single tokens of many requests run together as rows of one token; each piece of a prompt is a row of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from readme_jax.config import require
from readme_jax.models.paged import Rows
from readme_jax.serving.bank import Bank
from readme_jax.serving.policies import Limits
from readme_jax.serving.request import Batch, Work
from readme_jax.serving.residency import StepPlan

LAYER, FRESH, FIRST, COUNT = range(4)  # columns of the table of passes


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sizes that are compiled. page: positions of a page of keys. width: pages of a row's table. rungs: rows of one
    token. lengths: tokens of a piece of a prompt, one row."""

    page: int
    width: int
    rungs: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of all segments."""
        return [(b, 1) for b in self.rungs] + [(1, t) for t in self.lengths]

    def fit(self, count: int) -> int:
        """The shortest length for a piece of a prompt. ConfigError when none is long enough."""
        require(count <= self.lengths[-1], f"a piece of {count} tokens exceeds the longest chunk, {self.lengths[-1]}")
        return next(t for t in self.lengths if t >= count)


def grid(limits: Limits, context: int, page: int) -> Grid:
    """Rows: 1 and the largest batch halved up to three times. Lengths: the chunk, a quarter, a sixteenth of it."""
    rungs = {1} | {-(-limits.batch_requests // 2**i) for i in range(4)}
    lengths = {-(-limits.chunk // 4**i) for i in range(3)} - {1} or {2}
    return Grid(page, -(-context // page), tuple(sorted(rungs)), tuple(sorted(lengths)))


def empty(g: Grid, b: int, t: int, scrap: int) -> Rows:
    """Rows of padding: position 0, written to slot `scrap`."""
    zeros = [np.zeros((b, t), np.int32) for _ in range(3)]
    rows: Any = (*zeros, np.full((b, t), scrap, np.int32), np.zeros((b, g.width), np.int32))
    return Rows(*rows)


def fill(g: Grid, rows: Rows, row: int, ids: Sequence[int], start: int, pages: Sequence[int]) -> None:
    """A row of new tokens from position `start` on; what is left of it repeats the last position and is scrap."""
    arrays: Any = rows
    count, length = len(ids), arrays.ids_BT.shape[1]
    table_W = arrays.table_BW[row]
    table_W[: len(pages)] = pages
    position_T = np.arange(start, start + length)
    new_T = position_T[:count]
    arrays.ids_BT[row, :count] = ids
    arrays.position_BT[row] = np.minimum(position_T, start + count - 1)
    arrays.write_BT[row, :count] = table_W[new_T // g.page] * g.page + new_T % g.page


def cut(g: Grid, batch: Batch) -> list[tuple[tuple[int, int], list[int]]]:
    """(shape, places in the batch) of the segments of a batch."""
    single = [i for i, work in enumerate(batch.works) if work.count == 1]
    out = []
    for start in range(0, len(single), g.rungs[-1]):
        part = single[start : start + g.rungs[-1]]
        out.append(((next(b for b in g.rungs if b >= len(part)), 1), part))
    return out + [((1, g.fit(work.count)), [i]) for i, work in enumerate(batch.works) if work.count > 1]


def passes(bank: Bank, works: Sequence[Work], plan: StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a plan's passes, the pages that the experts of these works touch.

    flat_2Z: items and slots of all passes one after another, Z long enough to slice any pass with the pages of a layer.
    tables_XL4: int32, for each L passes, by the columns above. live: bool, passes that have anything to do.
    """
    experts = sorted(frozenset().union(*(work.experts for work in works)))
    mine = np.flatnonzero(bank.touch_LPE.reshape(-1, bank.experts)[plan.items][:, experts].any(1))
    flat_2Z = np.zeros((2, bank.items + bank.pages), np.int32)
    flat_2Z[:, : len(mine)] = plan.items[mine], plan.slots[mine]
    bounds = np.searchsorted(mine, np.asarray(plan.read))
    layers, depth = np.asarray(plan.layers, np.int32), bank.layers
    table = np.zeros((-(-len(layers) // depth) * depth, 4), np.int32)
    rows = table[: len(layers)]
    rows[:, LAYER], rows[:, FIRST], rows[:, COUNT] = layers, bounds[:-1], np.diff(bounds)
    rows[:, FRESH] = np.diff(layers, prepend=-1) != 0
    return flat_2Z, table.reshape(-1, depth, 4), (rows[:, FRESH] > 0) | (rows[:, COUNT] > 0)


def packed(tree: Any) -> np.ndarray:
    """int32 [Z]: the bits of all arrays of a tree, of four bytes an entry, one after another. One upload in place of
    many small ones."""
    leaves = [np.asarray(a) for a in jax.tree.leaves(tree)]
    assert all(a.dtype.itemsize == 4 for a in leaves), [a.dtype for a in leaves]
    return np.concatenate([a.reshape(-1).view(np.int32) for a in leaves])


def unpacked(told_Z: jax.Array, like: Any) -> Any:
    """The tree that was `packed`, inside a program. like: a tree of the same shapes and dtypes."""
    leaves, kind = jax.tree.flatten(like)
    ends = np.cumsum([a.size for a in leaves]).tolist()
    parts = [told_Z[end - a.size : end].reshape(a.shape) for a, end in zip(leaves, ends)]
    return kind.unflatten([jax.lax.bitcast_convert_type(part, a.dtype) for part, a in zip(parts, leaves)])
