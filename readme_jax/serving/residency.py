"""Which expert pages lie in the device's pool: for each step what to load, where, and what to evict for it.

`Residency.plan` is called once a batch, in the order in which batches will run, and depends on that order alone: not on
clocks, nor on how far the device is. Passes are counted over all steps, so a plan can name the last pass that still
reads what a load overwrites. Pure NumPy and Python.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from readme_jax.config import require
from readme_jax.serving import eviction
from readme_jax.serving.bank import Bank, Mode, Need, bits

Policy = Literal["lookahead", "lru", "lfu", "random"]
POLICIES: tuple[Policy, ...] = ("lookahead", "lru", "lfu", "random")
MODES: tuple[Mode, ...] = ("layer", "column")
FAR = 1 << 30  # steps: no announced step needs it
HALF_LIFE = 32  # steps after which a read counts half in what lookahead goes by where the queue says nothing
NO_IDS, NO_PASSES = np.zeros(0, np.int32), np.zeros(0, np.int64)
NO_LOADS = (NO_IDS, NO_IDS, NO_IDS, NO_PASSES)


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step reads and loads.

    A step is a sequence of passes: one a layer, or several (waves) for a layer whose pages do not fit in the pool
    together; waves have no page in common, and a layer's FFN output is the sum over its waves. Pass n runs layer
    layers[n] and reads the pages items[read[n] : read[n + 1]] (int32 item ids), found in slots[read[n] : read[n + 1]]
    (int32). Before it runs, its loads load[n] : load[n + 1] must be done, in order: page load_items[i] into slot
    load_slots[i], in place of page load_victims[i] (-1: the slot was empty). The slot may be overwritten once pass
    free_at[i] (int64, of the count over all steps; -1: at once) has run. first_pass: that count for this step's pass 0.
    """

    step: int
    first_pass: int
    layers: Sequence[int]
    read: Sequence[int]
    items: np.ndarray
    slots: np.ndarray
    load: Sequence[int]
    load_items: np.ndarray
    load_slots: np.ndarray
    load_victims: np.ndarray
    free_at: np.ndarray

    @property
    def passes(self) -> int:
        """Passes of the step: layers, and more with waves."""
        return len(self.layers)

    @property
    def loads(self) -> int:
        """Pages to load."""
        return len(self.load_items)

    def reads_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(item ids, slots) that pass `index` of this step reads."""
        rows = slice(self.read[index], self.read[index + 1])
        return self.items[rows], self.slots[rows]

    def loads_of(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(item ids, slots, victims, free_at) of the loads that pass `index` of this step waits for."""
        rows = slice(self.load[index], self.load[index + 1])
        return self.load_items[rows], self.load_slots[rows], self.load_victims[rows], self.free_at[rows]


@dataclasses.dataclass(slots=True)
class Counters:
    """Sums over the steps planned so far.

    pages_read: pages that passes read; loads of them had to be loaded, the rest were hits. token_layers: tokens times
    layers; token_layer_hits: those where no page of the token's expert had to be loaded. evictions: loads that took the
    slot of another page. bytes_loaded, bytes_read: the pages' bytes. waves: passes beyond one a layer.
    """

    steps: int = 0
    passes: int = 0
    waves: int = 0
    pages_read: int = 0
    loads: int = 0
    evictions: int = 0
    token_layers: int = 0
    token_layer_hits: int = 0
    bytes_read: int = 0
    bytes_loaded: int = 0

    @property
    def hit_ratio(self) -> float:
        """Share of the pages (so of the bytes) read that were resident; 1 before anything was read."""
        return 1 - self.loads / self.pages_read if self.pages_read else 1.0

    @property
    def token_hit_ratio(self) -> float:
        """Share of (token, layer) pairs whose expert was resident in full; 1 before anything was read."""
        return self.token_layer_hits / self.token_layers if self.token_layers else 1.0


class Residency:
    """A pool of slots, one expert page each, for all layers of a bank; see `plan`.

    budget: bytes of the pool. policy: what is evicted. `lookahead`: the page whose next use in the announced future is
    farthest (Belady's rule on what is honestly known); pages that no announced step uses come first: those that steps
    used least, where a use of HALF_LIFE steps ago counts half, and of equals the highest layer (it comes round last).
    `lru`: least recently read. `lfu`: read in the fewest passes so far (ties: least recently). `random`: any, drawn
    from `seed`. No page of the running pass is ever evicted. mode: with `layer`, pages of a layer may be evicted as
    soon as the step is past it; with `column`, the pages of a step, all layers, lie in the pool together (as in the
    paper), and a step too large for that runs as in mode layer. record: keep the pages of every pass (of every step, in
    mode column) in `accesses`, for `optimum.fewest_loads`. ConfigError for a budget below the least (see `Bank.slots`),
    an unknown policy or mode.
    """

    def __init__(
        self,
        bank: Bank,
        budget: int,
        *,
        policy: Policy = "lookahead",
        mode: Mode = "layer",
        seed: int = 0,
        record: bool = False,
    ):
        require(policy in POLICIES, f"residency={policy!r} is not one of {', '.join(POLICIES)}")
        require(mode in MODES, f"residency_mode={mode!r} is not one of {', '.join(MODES)}")
        self.bank, self.policy, self.mode = bank, policy, mode
        self.slots = bank.slots(budget, mode)
        self.counters = Counters()
        self.accesses: list[np.ndarray] | None = [] if record else None
        self.slot_of = np.full(bank.items, -1, np.int32)  # of each item, -1: not in the pool
        self.item_of = np.full(self.slots, -1, np.int32)  # in each slot, -1: empty
        self._free = list(range(self.slots - 1, -1, -1))  # empty slots, the next one to take last
        self._last_pass = np.full(bank.items, -1, np.int64)
        self._last_step = np.full(bank.items, -1, np.int64)
        self._uses = np.zeros(bank.items)  # steps that read the item, older ones less, as of `_last_step`
        self._layer_of = np.repeat(np.arange(bank.layers), bank.pages)
        self._touch_IE = bank.touch_LPE.reshape(-1, bank.experts)
        self._patterns_QE, pattern = np.unique(self._touch_IE, axis=0, return_inverse=True)
        self._pattern_of = pattern.reshape(-1)
        self._absent: int | None = None  # bits of what is not in the pool; None after loads, until asked for
        self._order = None if policy == "lookahead" else eviction.Order(policy, bank.items, self.slots, seed)

    # ---- what a scheduler asks ----------------------------------------------------------------

    def missing(self, experts: frozenset[int]) -> int:
        """Pages that a step of these experts would have to load if it were planned next (more if it evicts its own);
        pages on their way count as resident."""
        if self._absent is None:
            self._absent = bits(self.slot_of < 0)
        return (self.bank.find(experts).mask & self._absent).bit_count()

    def missing_bytes(self, experts: frozenset[int]) -> int:
        """`missing`, in bytes."""
        return self.missing(experts) * self.bank.page_bytes

    def fill(self) -> None:
        """All pages are in the pool from the start and no load is counted: it must have a slot for each."""
        assert self.slots >= self.bank.total, "a pool that holds all pages"
        self.plan(frozenset(range(self.bank.experts)))
        self.counters = Counters()
        if self.accesses is not None:
            self.accesses.clear()

    # ---- the plan -----------------------------------------------------------------------------

    def plan(
        self,
        experts: frozenset[int],
        future: Sequence[frozenset[int]] = (),
        tokens: Mapping[int, int] | None = None,
    ) -> StepPlan:
        """Plan the next step in program order.

        experts: those of the step's tokens. future: of the steps expected after this one, soonest first (only the
        policy lookahead looks). tokens: of each expert in the step, for the counters (None: one each). ConfigError for
        an expert that does not exist.
        """
        need = self.bank.find(experts)
        items_N, layers, read, pass_N = need.items_N, range(self.bank.layers), need.bounds, need.layer_N
        if need.widest > self.slots:
            items_N, layers, read, pass_N = self._waves(need)
        step, first = self.counters.steps, self.counters.passes
        together = self.mode == "column" and len(items_N) <= self.slots
        groups = (0, len(items_N)) if together else read
        if self.accesses is not None:
            self.accesses += [items_N[start:stop] for start, stop in zip(groups, groups[1:])]
        slots_N = self.slot_of[items_N]
        ago_N = step - self._last_step[items_N]
        self._last_step[items_N] = step
        if self._order is None:
            self._uses[items_N] = 1 + self._uses[items_N] * np.exp2(ago_N / -HALF_LIFE)
            found = self._farthest(items_N, slots_N, pass_N, groups, future)
        else:
            found = self._ordered(self._order, items_N, pass_N, groups)
        load, loaded = (0,) * (len(layers) + 1), NO_LOADS
        if found is not None:
            place_M, load_slots_M, victims_M, free_at_M = found
            load_items_M = items_N[place_M]
            slots_N[place_M] = load_slots_M
            self._absent = None
            load = np.searchsorted(pass_N[place_M], np.arange(len(layers) + 1)).tolist()
            loaded = (load_items_M, load_slots_M, victims_M, free_at_M)
            # in this order: a page may leave and come back, and a slot change hands, more than once in a step
            self.slot_of[victims_M[victims_M >= 0]] = -1
            self.item_of[load_slots_M] = load_items_M  # of equal slots the last one stays
            self.slot_of[self.item_of[load_slots_M]] = load_slots_M
        self._last_pass[items_N] = first + pass_N
        self._count(experts, tokens, len(layers), len(items_N), loaded)
        return StepPlan(step, first, layers, read, items_N, slots_N, load, *loaded)

    def _waves(self, need: Need) -> tuple[np.ndarray, list[int], list[int], np.ndarray]:
        """(items, layer of each pass, bounds of the passes, pass of each item) with layers too wide for the pool cut
        into waves: what is resident first, so that it is read before it has to make room."""
        items_N, layers, read = need.items_N.copy(), [], [0]
        for layer, (start, stop) in enumerate(zip(need.bounds, need.bounds[1:])):
            ids = items_N[start:stop]
            ids[:] = ids[np.argsort(self.slot_of[ids] < 0, kind="stable")]
            cuts = [*range(start + self.slots, stop, self.slots), stop]
            read += cuts
            layers += [layer] * len(cuts)
        return items_N, layers, read, np.repeat(np.arange(len(layers)), np.diff(read))

    def _count(
        self, experts: frozenset[int], tokens: Mapping[int, int] | None, passes: int, pages: int, loaded: eviction.Loads
    ) -> None:
        count, bank = self.counters, self.bank
        load_items_M, _, victims_M, _ = loaded
        ids = list(experts)
        weights = [1 if tokens is None else tokens.get(e, 0) for e in ids]
        count.steps += 1
        count.passes += passes
        count.waves += passes - bank.layers
        count.pages_read += pages
        count.bytes_read += pages * bank.page_bytes
        count.token_layers += sum(weights) * bank.layers
        count.token_layer_hits += sum(weights) * bank.layers
        if len(load_items_M):
            count.loads += len(load_items_M)
            count.bytes_loaded += len(load_items_M) * bank.page_bytes
            count.evictions += int(np.count_nonzero(victims_M >= 0))
            layer_M = self._layer_of[load_items_M]
            firsts = np.concatenate([[0], np.flatnonzero(layer_M[1:] != layer_M[:-1]) + 1])
            lacked = np.logical_or.reduceat(self._touch_IE[load_items_M], firsts, axis=0).sum(0)
            count.token_layer_hits -= sum(w * int(lacked[e]) for w, e in zip(weights, ids))

    # ---- lookahead ----------------------------------------------------------------------------

    def _next_use(self, items_N: np.ndarray, future: Sequence[frozenset[int]]) -> np.ndarray:
        """int64 rank of the next use after this step, larger is later: next step that needs the page, then its layer;
        behind all of these pages that no announced step needs, by HALF_LIFE times the logarithm of their uses (of pages
        used once: steps since), then layer."""
        bank, left = self.bank, set(range(self.bank.experts))
        next_E = np.full(bank.experts, FAR)
        for ahead, experts in enumerate(future, 1):
            for e in left & experts:
                next_E[e] = ahead
            left -= experts
            if not left:
                break
        next_Q = np.where(self._patterns_QE, next_E, FAR).min(1, initial=FAR)
        next_N = next_Q[self._pattern_of[items_N]]
        if left:
            ago_N = self.counters.steps - self._last_step[items_N]
            most = HALF_LIFE * np.log2(2 * HALF_LIFE)  # a page that every step read: no rank falls below FAR
            unused_N = np.rint(ago_N + most - HALF_LIFE * np.log2(self._uses[items_N])).astype(np.int64)
            next_N += np.where(next_N == FAR, unused_N, 0)
        return next_N * bank.layers + self._layer_of[items_N]

    def _farthest(
        self,
        items_N: np.ndarray,
        slots_N: np.ndarray,
        pass_N: np.ndarray,
        groups: Sequence[int],
        future: Sequence[frozenset[int]],
    ) -> eviction.Loads | None:
        """Loads of a step by Belady's rule. Victims, best first: pages that the rest of this step does not need, by
        `_next_use`; then what this step needs last."""
        absent = np.flatnonzero(slots_N < 0)
        if not len(absent):
            return None
        short = len(absent) - len(self._free)
        if short <= 0:
            taken = np.array([self._free.pop() for _ in absent], np.int32)
            return absent, taken, np.full(len(absent), -1, np.int32), np.full(len(absent), -1, np.int64)
        rest = self.item_of[self.item_of >= 0]
        rest = rest[self._last_step[rest] != self.counters.steps]
        rest_key = self._next_use(rest, future)
        key_N = self._next_use(items_N, future)
        if len(rest) > short:
            best = np.argpartition(-rest_key, short)[:short]
            rest, rest_key = rest[best], rest_key[best]
        empty = [self._free.pop() for _ in range(len(absent) - short)]
        last_pass = self._last_pass[rest]
        if len(rest) == short and rest_key.min() >= key_N.max():
            # no page that this step reads is a better victim than these; what was read longest ago is free first
            order = np.argsort(last_pass, kind="stable")
            return eviction.loads(absent, empty, self.slot_of[rest[order]], rest[order], last_pass[order])
        return eviction.farthest(
            absent,
            empty,
            np.concatenate([items_N, rest]),
            np.concatenate([slots_N, self.slot_of[rest]]),
            np.concatenate([self._last_pass[items_N], last_pass]),
            np.concatenate([key_N, rest_key]),
            groups,
            self.counters.passes + pass_N,
        )

    # ---- lru, lfu, random ---------------------------------------------------------------------

    def _ordered(
        self, order: eviction.Order, items_N: np.ndarray, pass_N: np.ndarray, groups: Sequence[int]
    ) -> eviction.Loads | None:
        items, passes = items_N.tolist(), (self.counters.passes + pass_N).tolist()
        moved, place, slots, evicted, free_at = {}, [], [], [], []
        for start, stop in zip(groups, groups[1:]):
            for i, victim, last in order.read(items[start:stop], passes[start:stop]):
                if victim < 0:
                    slot = self._free.pop()
                else:
                    slot = moved[victim] if victim in moved else int(self.slot_of[victim])
                moved[items[start + i]] = slot
                place.append(start + i)
                slots.append(slot)
                evicted.append(victim)
                free_at.append(last)
        if not place:
            return None
        return np.array(place), np.array(slots, np.int32), np.array(evicted, np.int32), np.array(free_at, np.int64)
