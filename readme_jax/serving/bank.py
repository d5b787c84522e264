"""Expert pages: the channel bank of a model cut into equal pages, the unit of residency, transfers and decode.

A page is `page` rows of one layer; a row is one channel of gate, up and down. An expert touches a page when it has any
of its channels. Tied experts: rows are reordered so that channels of equal membership lie together and neighbours
differ in few experts, which keeps the pages of an expert few. Separate experts: each expert's rows are its own pages.
Pure NumPy.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from readme_jax.config import require
from readme_jax.routing import membership

Storage = Literal["tied", "separate"]
Mode = Literal["layer", "column"]
GONE = -(2.0**20)  # above any number of experts, and exact in float32
CACHED_IDS = 1 << 24  # page ids kept in the cache of needs (64 MiB); then it starts afresh


class Need(NamedTuple):
    """Pages that a set of experts touches.

    items_N: int32 item ids (layer * pages + page), ascending, so layer by layer. bounds: L + 1 places, layer l is
    items_N[bounds[l] : bounds[l + 1]]. layer_N: int32 layer of each. widest: most pages of one layer.
    mask: the items as a set of bits, see `bits`.
    """

    items_N: np.ndarray
    bounds: tuple[int, ...]
    layer_N: np.ndarray
    widest: int
    mask: int


def bits(has_I: np.ndarray) -> int:
    """A set of items as a whole number, so that a difference of sets takes a microsecond: bool [items] -> bits, in an
    order of its own."""
    return int.from_bytes(np.packbits(has_I).tobytes(), "big")


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """The pages of a model's experts. L layers, P pages in each, E experts, R = `page` rows in a page.

    page_bytes: device bytes of one page. channels: channels of one expert in a layer. order_LR: int32 [L, P * R],
    channel held by each row, -1 for padding. touch_LPE: bool [L, P, E], whether an expert has a channel of a page.
    Item i is page i % P of layer i // P. Made by `from_table` and `synthetic`.
    """

    page: int
    page_bytes: int
    channels: int
    storage: Storage
    order_LR: np.ndarray
    touch_LPE: np.ndarray
    _needs: dict[frozenset[int], Need] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def layers(self) -> int:
        """L."""
        return self.touch_LPE.shape[0]

    @property
    def pages(self) -> int:
        """P, pages of one layer. Where layers differ in used channels, some have pages that nobody touches."""
        return self.touch_LPE.shape[1]

    @property
    def experts(self) -> int:
        """E."""
        return self.touch_LPE.shape[2]

    @property
    def items(self) -> int:
        """L * P."""
        return self.layers * self.pages

    @property
    def total(self) -> int:
        """Pages that any expert touches, in all layers: with this many slots nothing is ever loaded twice."""
        return int(self.touch_LPE.any(2).sum())

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages that any expert touches."""
        return self.total * self.page_bytes

    def find(self, experts: Iterable[int]) -> Need:
        """The pages that any of `experts` touches; cached by set. ConfigError for an expert outside 0..E-1."""
        key = frozenset(experts)
        found = self._needs.get(key)
        if found is None:
            ids = sorted(key)
            good = not ids or (0 <= ids[0] and ids[-1] < self.experts)
            require(good, f"experts={ids} must be in 0..{self.experts - 1}")
            need_LP = self.touch_LPE[:, :, ids].any(2)
            items_N = np.flatnonzero(need_LP).astype(np.int32)
            counts_L = need_LP.sum(1)
            bounds = (0, *np.cumsum(counts_L).tolist())
            layer_N = np.repeat(np.arange(self.layers, dtype=np.int32), counts_L)
            for array in (items_N, layer_N):
                array.flags.writeable = False
            found = Need(items_N, bounds, layer_N, int(counts_L.max(initial=0)), bits(np.asarray(need_LP)))
            if (len(self._needs) + 1) * self.items > CACHED_IDS:
                self._needs.clear()
            self._needs[key] = found
        return found

    def need(self, experts: Iterable[int]) -> list[np.ndarray]:
        """For each layer the page ids (int32, within the layer, ascending) that any of `experts` touches."""
        found = self.find(experts)
        return [
            found.items_N[start:stop] - layer * self.pages
            for layer, (start, stop) in enumerate(zip(found.bounds, found.bounds[1:]))
        ]

    def need_count(self, experts: Iterable[int]) -> int:
        """Pages that any of `experts` touches, in all layers: what a step of theirs reads, in pages."""
        return len(self.find(experts).items_N)

    def least(self, mode: Mode) -> int:
        """Slots that the smallest pool must have: the most pages of one expert, in one layer or in all of them."""
        count_LE = self.touch_LPE.sum(1)
        return int(count_LE.max() if mode == "layer" else count_LE.sum(0).max())

    def slots(self, budget: int, mode: Mode = "layer") -> int:
        """Slots of a pool of `budget` bytes: whole pages, no more than there are. ConfigError below the least."""
        least = self.least(mode)
        where = "a layer" if mode == "layer" else "all layers"
        require(
            budget >= least * self.page_bytes,
            f"expert_memory={budget} bytes must hold the channels of the largest expert in {where}, shared ones "
            f"included: at least {least * self.page_bytes} bytes ({least} pages of {self.page_bytes})",
        )
        return min(budget // self.page_bytes, self.total)

    @property
    def read_ratio(self) -> float:
        """Rows of the pages that one expert touches over the channels it has, mean over layers and experts (>= 1)."""
        return float(self.touch_LPE.sum(1).mean() * self.page / self.channels)

    @classmethod
    def from_table(
        cls,
        table_LEC: np.ndarray,
        mlp: int,
        *,
        row_bytes: int,
        page: int | None = None,
        separate: bool = False,
    ) -> "Bank":
        """Pages of an expert table.

        table_LEC: int [L, E, C], channel ids of each expert. mlp: F, channels of the stored FFN. row_bytes: of one
        channel's gate, up and down. page: rows of a page (None: 16 below 4096 channels, else 32). separate: experts
        share no channel and each gets pages of its own. ConfigError for sizes below 1, ids outside 0..F-1, an id that
        an expert has twice, or shared channels with `separate`.
        """
        table_LEC = np.asarray(table_LEC)
        require(table_LEC.ndim == 3 and table_LEC.size > 0, f"expert table has shape {table_LEC.shape}, not [L, E, C]")
        page = (16 if mlp < 4096 else 32) if page is None else page
        require(page >= 1, f"page={page} must be at least 1 row")
        require(row_bytes >= 1, f"row_bytes={row_bytes} must be at least 1")
        low, high = int(table_LEC.min()), int(table_LEC.max())
        require(0 <= low and high < mlp, f"expert table names channels {low}..{high}, outside 0..{mlp - 1}")
        layers, experts, channels = table_LEC.shape
        member_LEF = membership(table_LEC, mlp)
        require(bool((member_LEF.sum(2) == channels).all()), "expert table names a channel twice in one expert")
        shared = bool((member_LEF.sum(1) > 1).any())
        require(not (separate and shared), "storage=separate: the expert table names a channel in two experts")
        if separate:
            rows = -(-channels // page) * page
            order_LER = np.full((layers, experts, rows), -1, np.int32)
            order_LER[..., :channels] = np.sort(table_LEC, axis=-1)
            order_LR = order_LER.reshape(layers, -1)
        else:
            walks = [_walk(member_EF) for member_EF in member_LEF]
            rows = -(-max(map(len, walks)) // page) * page
            order_LR = np.stack([np.append(walk, np.full(rows - len(walk), -1, np.int32)) for walk in walks])
        member_LER = np.take_along_axis(member_LEF, np.maximum(order_LR, 0)[:, None, :], axis=2)
        member_LER &= (order_LR >= 0)[:, None, :]
        touch_LPE = np.moveaxis(member_LER, 1, 2).reshape(layers, -1, page, experts).any(axis=2)
        return cls(
            page, page * row_bytes, channels, "separate" if separate else "tied", order_LR, np.asarray(touch_LPE)
        )

    @classmethod
    def synthetic(
        cls,
        *,
        layers: int,
        experts: int,
        channels: int,
        row_bytes: int,
        storage: Storage = "separate",
        page: int | None = None,
        mlp: int | None = None,
        overlap: float = 0.69,
        seed: int = 0,
    ) -> "Bank":
        """Pages of a model that is not at hand.

        channels: C of one expert. separate: F = E * C, a page is one expert's rows of a layer unless `page` says
        otherwise; `mlp` and `overlap` have no part in it. tied: `mlp` channels (None: 2 C), of which two experts share
        `overlap` of theirs on average: every channel has a popularity drawn from a Beta distribution with mean C / F
        and the second moment that gives this overlap, and each expert takes its C likeliest by independent draws. At
        the 69 % measured on SmolLM2 (seven experts) that gives the share in all experts and in any to within a few
        points as well. ConfigError for sizes below 1 or an overlap outside C / F .. 1.
        """
        sizes = {"layers": layers, "experts": experts, "channels": channels}
        for name, value in sizes.items():
            require(value >= 1, f"{name}={value} must be at least 1")
        if storage == "separate":
            table_EC = np.arange(experts * channels, dtype=np.int32).reshape(experts, channels)
            table_LEC = np.broadcast_to(table_EC, (layers, experts, channels))
            return cls.from_table(
                table_LEC, experts * channels, row_bytes=row_bytes, page=page or channels, separate=True
            )
        require(storage == "tied", f"storage={storage!r} is not one of 'tied', 'separate'")
        mlp = 2 * channels if mlp is None else mlp
        require(channels < mlp, f"channels={channels} must be below mlp={mlp}")
        share = channels / mlp
        require(share < overlap < 1, f"overlap={overlap} must be above channels / mlp = {share:g} and below 1")
        rng = np.random.default_rng(seed)
        # Beta(a, b) with mean m and E[q^2] = m * overlap: variance m (overlap - m) = m (1 - m) / (a + b + 1).
        strength = (1 - share) / (overlap - share) - 1
        popular_LF = rng.beta(share * strength, (1 - share) * strength, (layers, mlp)).clip(1e-9, 1 - 1e-9)
        logit_LF = np.log(popular_LF) - np.log1p(-popular_LF)
        score_LEF = logit_LF[:, None] + rng.logistic(size=(layers, experts, mlp))
        table_LEC = np.sort(np.argsort(-score_LEF, axis=-1, kind="stable")[..., :channels], axis=-1)
        return cls.from_table(table_LEC.astype(np.int32), mlp, row_bytes=row_bytes, page=page)


def _walk(member_EF: np.ndarray) -> np.ndarray:
    """Channels that any expert has, int32, grouped by membership; from the fullest pattern on, the next one is always
    the nearest in Hamming distance that is left (ties: the one of most channels, then the lowest)."""
    pattern_QE, which_F, count_Q = np.unique(member_EF.T, axis=0, return_inverse=True, return_counts=True)
    order_Q = np.argsort(-count_Q, kind="stable")  # so that of equals the first is taken
    pattern_QE, count_Q = pattern_QE[order_Q], count_Q[order_Q]
    # The product of two rows of signs is E - 2 * distance. One more column takes what is behind us out of the race.
    sign_QX = np.zeros((len(pattern_QE), pattern_QE.shape[1] + 1), np.float32)
    sign_QX[:, :-1] = 2.0 * pattern_QE - 1
    size_Q = pattern_QE.sum(1)
    sign_QX[size_Q == 0, -1] = GONE  # channels that nobody has are left out
    rank_Q, at = np.full(len(pattern_QE), -1), int(size_Q.argmax())
    for rank in range(np.count_nonzero(size_Q)):
        rank_Q[at], sign_QX[at, -1] = rank, GONE
        here_X = sign_QX[at].copy()
        here_X[-1] = 1
        at = int((sign_QX @ here_X).argmax())
    rank_F = np.empty_like(rank_Q)
    rank_F[order_Q] = rank_Q
    rank_F = rank_F[which_F.reshape(-1)]
    order = np.argsort(rank_F, kind="stable")
    return order[np.count_nonzero(rank_F < 0) :].astype(np.int32)
