"""The device side of serving: paged keys and values, expert pages in one pool, a fixed ladder of compiled programs.

The only file of serving that runs model code. Layers are dispatched one by one: a page that layer l + 1 needs may be
put into the pool while layer l runs, and a program for each shape of one layer is all there is to compile. Nothing here
knows a request's past: a step reads what it needs of its requests when it is enqueued.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import hf
from readme_jax.config import require
from readme_jax.models import expert_pages, expert_whole, paged
from readme_jax.models.expert_kernels import row_major
from readme_jax.models.expert_pages import Pages
from readme_jax.models.paged import Cache, Rows
from readme_jax.serving import sampling, segments
from readme_jax.serving.bank import Bank
from readme_jax.serving.policies import Limits
from readme_jax.serving.programs import Job, Programs
from readme_jax.serving.request import Batch, Request
from readme_jax.serving.residency import StepPlan
from readme_jax.sharding import REPLICATED, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of a step that run together; arrays are on the device.

    works: their places in the batch. told: the rows and the place of a prompt piece's last token, `segments.packed`.
    passes: (flat_2Z, tables, live): items and slots of all passes one after another; for each L passes, int32 [L, 4],
    see `segments.passes`; whether a pass has anything to do here. None where all pages are in their place. draw: what
    sampling takes, None where nobody samples.
    """

    works: tuple[int, ...]
    shape: tuple[int, int]
    told: jax.Array
    passes: tuple[jax.Array, tuple[jax.Array, ...], list[bool]] | None
    draw: tuple[jax.Array, sampling.History] | None


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step on the device: for each segment that samples, its works' places in the batch and what was drawn."""

    size: int
    asked: tuple[bool, ...]
    drawn: tuple[tuple[tuple[int, ...], jax.Array, sampling.Drawn], ...]
    best: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pass:
    """Which pages a pass reads: see `Segment`."""

    flat_2Z: jax.Array
    table_L4: jax.Array
    at: jax.Array


class Runner:
    """A carved model on one device, its experts in a pool of `slots` pages.

    folder: a model folder. bank: its pages. kv_pages, router_pages: pages of keys and values, `kv_page` positions each,
    of the backbone (in every layer) and of the router. limits: give the ladder of shapes. context: longest row.
    load_sizes: pages that `insert` takes at a time. The weights outside the pool are on the device when this returns.
    resident: the pages are so too, in place of a pool: for CPUs with room for all of them, see `models.expert_whole`.
    """

    def __init__(
        self,
        folder: str | Path,
        bank: Bank,
        *,
        slots: int,
        kv_pages: int,
        kv_page: int,
        router_pages: int,
        limits: Limits,
        context: int,
        dtype: str = "float32",
        load_sizes: Sequence[int] = (4, 32),
        resident: bool = False,
    ):
        self.cfg, expert_config, self.router_cfg = hf.read_config(Path(folder))
        require(expert_config is not None, f"{folder}: a dense model has no experts to serve")
        params, table_LEC, router_params = hf.load_params(folder, dtype=jnp.dtype(dtype))
        assert table_LEC is not None
        self.bank, self.kv_page, self.context, self.dtype = bank, kv_page, context, jnp.dtype(dtype)
        self.load_sizes, self.slots = tuple(sorted(load_sizes)), slots
        self._grid = segments.grid(limits, context, kv_page)
        self.kv_slots, self.router_slots = kv_pages * kv_page, router_pages * kv_page
        self.bytes_read = 0
        self.device_s = 0.0
        self._programs = Programs()
        self._mesh = make_mesh(MeshConfig(data=1))
        self._place = jax.NamedSharding(self._mesh, REPLICATED)
        self.device = self._mesh.devices.item()
        self.resident = resident
        self._load(params, table_LEC, router_params)

    # ---- what lies on the device ------------------------------------------------------------------

    def _load(self, params: dict[str, Any], table_LEC: np.ndarray, router_params: Any) -> None:
        cfg, bank, layers = self.cfg, self.bank, params["layers"]
        self.host_weights = layers["w_gate"], layers["w_up"], layers["w_down"]
        if self.resident:  # shapes without memory: nothing is loaded after this
            nothing = np.broadcast_to(np.zeros((), self.dtype), layers["w_gate"].shape)
            self.host_weights = nothing, nothing, nothing
        bias_I2R = expert_pages.host_biases(layers, bank.order_LR, bank.page) if cfg.mlp_bias else None
        member_IWR = expert_pages.member_bits(expert_pages.membership(table_LEC, bank.order_LR, bank.page))
        put, self._rows = self._put, row_major(self._place)
        if self.resident:
            host = expert_whole.host_layers(layers, bank.order_LR, member_IWR, bias_I2R, self.dtype)
            self._whole = [put(whole) for whole in host]
            self._lists = put(expert_whole.host_lists(bank.touch_LPE))
        else:
            pool_SQD = np.zeros((self.slots, 3 * bank.page, cfg.embed), self.dtype)
            self._pages = jax.device_put(Pages(pool_SQD, member_IWR, bias_I2R), self._rows)  # pyright: ignore
        self._top = put({name: w for name, w in params.items() if name != "layers"})
        self._layers = [put(paged.layer_weights(cfg, layers, index, self.dtype)) for index in range(cfg.layer)]
        self._windows = put(np.array(cfg.windows, np.int32)) if any(cfg.windows) else None
        shape = (self.kv_slots + self.kv_page, cfg.kv_head * cfg.head_dim)  # the last page is scrap
        self._caches = [Cache(*put((np.zeros(shape, self.dtype),) * 2)) for _ in range(cfg.layer)]
        self._router = self._router_cache = None
        if self.router_cfg is not None:
            shape = (self.router_cfg.layers * self.router_slots + self.kv_page, self.router_cfg.width)
            self._router = put(jax.tree.map(lambda w: w.astype(np.float32), router_params))
            self._router_cache = Cache(*put((np.zeros(shape, np.float32),) * 2))
        self._index = [put(np.int32(i)) for i in range(cfg.layer)]
        self._start, self._silent = {}, {}
        for b, t in self.shapes:
            stream = (np.zeros((b, t, cfg.embed), self.dtype),) * (1 if self.resident else 2)
            self._start[b, t] = put(stream)
            nothing = np.full((b, self.context), cfg.vocab, np.int32), np.zeros((b, self.context), np.int32)
            self._silent[b] = put(sampling.History(*nothing)) if b not in self._silent else self._silent[b]
        self._layer_bytes = sum(w.nbytes for w in jax.tree.leaves(self._layers[0]))
        self._head_bytes = self._top.get("head", self._top["embedding"]).nbytes

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._place)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of the segments that are compiled."""
        return self._grid.shapes

    @property
    def programs(self) -> int:
        """Compiled programs."""
        return len(self._programs)

    @property
    def compiles(self) -> int:
        """What JAX has compiled in this process after them, for whomever."""
        return self._programs.compiles

    # ---- programs ---------------------------------------------------------------------------------

    def _rows_told(self, b: int, t: int) -> tuple[Rows, np.ndarray]:
        """Rows of padding and a last token: what a segment is told, before it is packed."""
        return segments.empty(self._grid, b, t, self.kv_slots), np.zeros(1, np.int32)

    def _draw_told(self, asked: Sequence[Request | None]) -> tuple[sampling.Rows, Rows]:
        """What sampling and the router's step of a segment are told, before it is packed."""
        return sampling.host_rows(asked), segments.empty(self._grid, len(asked), 1, self.router_slots)

    def _whole_program(self, weights, embedding, cache, stream, told, whole, lists_ELX, windows, index):
        (x_BTD,) = stream
        b, t, _ = x_BTD.shape
        rows, _ = segments.unpacked(told, self._rows_told(b, t))
        x_BTD = jnp.where(index == 0, embedding[rows.ids_BT].astype(x_BTD.dtype), x_BTD)
        window = None if windows is None else windows[index]
        (x_BTD, normed_BTD), cache = paged.mix(self.cfg, weights, cache, x_BTD, rows, window, page=self.kv_page)
        with jax.named_scope("experts"):
            x_MD, expert_M = normed_BTD.reshape(b * t, -1), rows.expert_BT.reshape(-1)
            if b * t == 1:
                y_MD = expert_whole.listed(x_MD, whole, lists_ELX[expert_M[0], index], expert_M)
            else:
                y_MD = expert_whole.ffn(x_MD, whole, expert_M)
        return (x_BTD + y_MD.reshape(x_BTD.shape),), cache

    def _layer_program(self, weights, embedding, cache, stream, told, pages, which: _Pass, windows):
        rows, _ = segments.unpacked(told, self._rows_told(*stream[0].shape[:2]))
        entry_4 = which.table_L4[which.at]
        first, count = entry_4[segments.FIRST], entry_4[segments.COUNT]
        item_N, slot_N = jax.lax.dynamic_slice(which.flat_2Z, (0, first), (2, self.bank.pages))
        fresh = entry_4[segments.FRESH] > 0
        return paged.layer(
            self.cfg,
            weights,
            embedding,
            cache,
            stream,
            rows,
            pages,
            (slot_N, item_N, count),
            None if windows is None else windows[entry_4[segments.LAYER]],
            start=fresh & (entry_4[segments.LAYER] == 0),
            fresh=fresh,
            page=self.kv_page,
        )

    def _last_program(self, x_1TD, told):
        _, last_1 = segments.unpacked(told, self._rows_told(1, x_1TD.shape[1]))
        return jax.lax.dynamic_slice_in_dim(x_1TD, last_1[0], 1, axis=1)

    def _finish_program(self, top, router, router_cache, x_B1D, told, history):
        draw, rows = segments.unpacked(told, self._draw_told([None] * len(x_B1D)))
        drawn = sampling.sample(paged.logits(self.cfg, top, x_B1D[:, 0]), draw, history)
        expert_B = jnp.zeros_like(drawn.token_B)
        if router is not None:
            rows = dataclasses.replace(rows, ids_BT=drawn.token_B[:, None])
            expert_BT, router_cache = self._route_rows(router, router_cache, rows)
            expert_B = expert_BT[:, 0]
        return jnp.stack([drawn.token_B, expert_B]), drawn, router_cache

    def _route_program(self, router, cache, told, t: int):
        return self._route_rows(router, cache, segments.unpacked(told, self._rows_told(1, t))[0])

    def _route_rows(self, router, cache, rows):
        assert self.router_cfg is not None
        return paged.route(self.router_cfg, router, cache, rows, self.cfg.rope_theta, page=self.kv_page)

    def _insert_program(self, pool_SQD, new_MQD, slot_M):
        return pool_SQD.at[slot_M].set(new_MQD, mode="drop")

    def _jobs(self) -> list[Job]:
        """Every program."""
        flat_2Z = np.zeros((2, self.bank.items + self.bank.pages), np.int32)
        which = self._put(_Pass(flat_2Z, np.zeros((self.cfg.layer, 4), np.int32), np.int32(0)))  # pyright: ignore
        jobs = []
        for b, t in self.shapes:
            told, stream = self._put(segments.packed(self._rows_told(b, t))), self._start[b, t]
            layer = (self._layers[0], self._top["embedding"], self._caches[0], stream, told)
            if self.resident:
                layer = (*layer, self._whole[0], self._lists, self._windows, self._index[0])
                jobs.append(Job(("layer", b, t), self._whole_program, layer, (2,)))
            else:
                layer = (*layer, self._pages, which, self._windows)
                jobs.append(Job(("layer", b, t), self._layer_program, layer, (2,)))
            if t > 1:
                jobs.append(Job(("last", t), self._last_program, (stream[0], told), ()))
                if self._router is not None:
                    route = functools.partial(self._route_program, t=t)
                    jobs.append(Job(("route", t), route, (self._router, self._router_cache, told), (1,)))
                continue
            told = self._put(segments.packed(self._draw_told([None] * b)))
            finish = (self._top, self._router, self._router_cache, stream[0], told, self._silent[b])
            jobs.append(Job(("finish", b), self._finish_program, finish, (2,)))
        for size in () if self.resident else self.load_sizes:
            pool_SQD = self._pages.pool_SQD
            new = self._put((np.zeros((size, *pool_SQD.shape[1:]), self.dtype), np.zeros(size, np.int32)))
            jobs.append(Job(("insert", size), self._insert_program, (pool_SQD, *new), (0,), self._rows))
        return jobs

    def compile(self, progress: bool = True) -> None:
        """Compile every program ahead, with a bar on a terminal; see `Programs`."""
        with jax.set_mesh(self._mesh):
            self._programs.compile(self._jobs(), progress)

    def router_s(self, rows: int = 1, times: int = 50) -> float:
        """Seconds of one router step of `rows` tokens alone, median: what pre-gating costs a decode step.

        Compiles a program of its own, which `compiles` counts: for benchmarks, after all else.
        """
        if self._router is None:
            return 0.0
        with jax.set_mesh(self._mesh):
            program = jax.jit(self._route_rows, donate_argnums=1)
            new, taken = self._put(segments.empty(self._grid, rows, 1, self.router_slots)), []
            for _ in range(times):
                began = time.perf_counter()
                expert_BT, self._router_cache = program(self._router, self._router_cache, new)
                expert_BT.block_until_ready()
                taken.append(time.perf_counter() - began)
        return float(np.median(taken))

    def close(self) -> None:
        """Give the device memory back."""
        self._programs.close()
        pages = "_pages", "_whole", "_lists"
        for name in (*pages, "_top", "_layers", "_caches", "_router", "_router_cache", "_start", "_silent"):
            for array in jax.tree.leaves(self.__dict__.pop(name, None)):
                array.delete()

    # ---- experts on arrival -----------------------------------------------------------------------

    def route(self, tokens: Sequence[int], first: int, router_pages: Sequence[int]) -> Any:
        """Enqueue the router on known tokens, the first of them at position `first`; see `fetch_experts`."""
        if self._router is None:
            return len(tokens)
        out, longest = [], self._grid.lengths[-1]
        for start in range(0, len(tokens), longest):
            ids = tokens[start : start + longest]
            t = self._grid.fit(len(ids))
            rows = segments.empty(self._grid, 1, t, self.router_slots)
            segments.fill(self._grid, rows, 0, ids, first + start, router_pages)
            program, told = self._programs["route", t], segments.packed((rows, np.zeros(1, np.int32)))
            expert_BT, self._router_cache = program(self._router, self._router_cache, self._put(told))
            out.append((len(ids), expert_BT))
        return out

    def fetch_experts(self, handle: Any) -> list[int]:
        """Expert of each token of a `route`, waiting for it."""
        if isinstance(handle, int):
            return [0] * handle
        began = time.perf_counter()
        fetched = jax.device_get([expert_BT for _, expert_BT in handle])
        self.device_s += time.perf_counter() - began
        return [e for (count, _), expert_BT in zip(handle, fetched) for e in expert_BT[0, :count].tolist()]

    # ---- steps ------------------------------------------------------------------------------------

    def insert(self, slots: np.ndarray, pages_MQD: jax.Array) -> None:
        """Enqueue the first len(slots) of `pages_MQD` into these slots of the pool, after all that is enqueued."""
        size = len(pages_MQD)
        slot_M = np.full(size, self.slots, np.int32)
        slot_M[: len(slots)] = slots
        pool_SQD = self._programs["insert", size](self._pages.pool_SQD, pages_MQD, self._put(slot_M))
        self._pages = dataclasses.replace(self._pages, pool_SQD=pool_SQD)

    def _segment(self, batch: Batch, plan: StepPlan, shape: tuple[int, int], places: list[int]) -> Segment:
        b, t = shape
        works = [batch.works[i] for i in places]
        rows, last_1 = self._rows_told(b, t)
        last_1[0] = works[0].count - 1
        asked: list[Request | None] = [None] * b
        for row, work in enumerate(works):
            request, end = work.request, work.start + work.count
            segments.fill(self._grid, rows, row, request.tokens[work.start : end], work.start, request.pages)
            rows.expert_BT[row, : work.count] = request.experts[work.start : end]
            asked[row] = request if work.samples else None
        passes = None
        if self.resident:
            pages = self.bank.need_count(works[0].experts) if b * t == 1 else self.bank.items
        else:
            flat_2Z, tables, live = segments.passes(self.bank, works, plan)
            pages = int(tables[..., segments.COUNT].sum())
            passes = (*self._put((flat_2Z, tuple(tables))), live.tolist())
        self.bytes_read += pages * self.bank.page_bytes + self.cfg.layer * self._layer_bytes
        kv = 2 * self.cfg.layer * self.cfg.kv_head * self.cfg.head_dim * self.dtype.itemsize
        self.bytes_read += kv * sum(work.start + work.count for work in works)
        draw = None
        if any(asked):
            self.bytes_read += self._head_bytes
            history = sampling.host_history(asked, self.context, self.cfg.vocab)
            told = self._draw_told(asked)
            if self._router is not None:
                for row, request in enumerate(asked):
                    if request is not None:
                        end = works[row].start + works[row].count
                        segments.fill(self._grid, told[1], row, [0], end, request.router_pages)
            draw = self._put(segments.packed(told)), self._silent[b] if history is None else self._put(history)
        return Segment(tuple(places), shape, self._put(segments.packed((rows, last_1))), passes, draw)

    def step(self, batch: Batch, plan: StepPlan, before_pass: Callable[[int], None] | None = None) -> Flight:
        """Enqueue a step: every pass of the plan for every segment of the batch, then sampling and the router.

        before_pass(n) is called just before pass n is enqueued, to put its pages into the pool.
        """
        parts = [self._segment(batch, plan, *part) for part in segments.cut(self._grid, batch)]
        streams = [self._start[segment.shape] for segment in parts]
        depth, embedding = self.cfg.layer, self._top["embedding"]
        for n, layer in enumerate(plan.layers):
            if before_pass is not None:
                before_pass(n)
            for s, segment in enumerate(parts):
                if segment.passes is None:
                    more = (self._whole[layer], self._lists, self._windows, self._index[layer])
                elif segment.passes[2][n]:
                    flat_2Z, tables, _ = segment.passes
                    more = (self._pages, _Pass(flat_2Z, tables[n // depth], self._index[n % depth]), self._windows)
                else:
                    continue
                streams[s], self._caches[layer] = self._programs["layer", *segment.shape](
                    self._layers[layer], embedding, self._caches[layer], streams[s], segment.told, *more
                )
        drawn = []
        for segment, stream in zip(parts, streams):
            if segment.draw is not None:
                (b, t), x_BTD = segment.shape, stream[0]
                x_B1D = x_BTD if t == 1 else self._programs["last", t](x_BTD, segment.told)
                pair_2B, rest, self._router_cache = self._programs["finish", b](
                    self._top, self._router, self._router_cache, x_B1D, *segment.draw
                )
                drawn.append((segment.works, pair_2B, rest))
        samples = tuple(work.samples for work in batch.works)
        wanted = [work.request.sampling.logprobs for work in batch.works]
        return Flight(len(samples), samples, tuple(drawn), tuple(-1 if n is None else n for n in wanted))

    def fetch(self, flight: Flight) -> list[sampling.Score | None]:
        """What each work of a step drew, None where it did not sample: the one place that waits for the device."""
        began = time.perf_counter()
        wanted = [any(flight.best[i] >= 0 for i in works) for works, _, _ in flight.drawn]
        fetched = jax.device_get(
            [(pair, rest if want else None) for (_, pair, rest), want in zip(flight.drawn, wanted)]
        )
        self.device_s += time.perf_counter() - began
        out: list[sampling.Score | None] = [None] * flight.size
        for (works, _, _), (pair_2B, rest) in zip(flight.drawn, fetched):
            for row, i in enumerate(works):
                if flight.asked[i]:
                    most = flight.best[i]
                    out[i] = sampling.score(pair_2B[:, row], rest, row, most)
        return out
