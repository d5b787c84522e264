"""The device side of serving on a mesh: separate experts spread over its `expert` axis, requests over the same devices.

Attention, keys and values, sampling and router of a row run on the row's own device. In the FFN of every layer the
tokens go to the device of their expert and back by two all-to-alls (`models.parallel`). Expert ids are known on the
host, so one plan a segment serves all layers, and it picks the smallest of a few compiled sizes that drops no token.

Letters beside those of `models.parallel`: G = X devices times b rows, device by device.
"""

import collections
import dataclasses
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import hf, routing
from readme_jax.config import require
from readme_jax.models import paged, parallel, router
from readme_jax.models.paged import Cache, Rows
from readme_jax.serving import mesh_segments, sampling, segments
from readme_jax.serving.bank import Bank
from readme_jax.serving.policies import Limits
from readme_jax.serving.programs import Job, Programs
from readme_jax.serving.request import Batch, Request
from readme_jax.serving.residency import StepPlan
from readme_jax.sharding import REPLICATED, MeshConfig, make_mesh, spec

OWN = spec("batch")  # a part for each device
SILENT = -2  # in place of the number of best tokens asked for: samples nothing


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of a step that run together; arrays are on the devices. works: (row, place in the batch) of each. size: S of
    its all-to-alls. draw: what sampling takes, None where nobody samples."""

    works: tuple[tuple[int, int], ...]
    shape: tuple[int, int]
    size: int
    rows: Rows
    last_G: jax.Array
    route: parallel.Parallel
    draw: tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step on the devices: (row, place in the batch) and what was drawn for each segment that samples. best: best
    tokens asked for by each work, -1: no log-probability; SILENT."""

    drawn: tuple[tuple[tuple[tuple[int, int], ...], jax.Array, sampling.Drawn], ...]
    best: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Piece:
    """Tokens whose experts are wanted, from position `start` on, and what the router made of them once it was sent:
    experts [X, T], the device's own row."""

    device: int
    ids: list[int]
    start: int
    pages: np.ndarray
    expert_XT: jax.Array | None = None


class MeshRunner:
    """A model with separate experts on `devices` devices. The interface is that of `serving.runner.Runner`, without
    loads: every expert stays on its device.

    kv_pages, router_pages: of each device; the ids of device x begin at x times that. limits: of a batch, all devices
    together. ConfigError for tied experts, experts that do not spread evenly, and more devices than there are.
    """

    def __init__(
        self,
        folder: str | Path,
        bank: Bank,
        *,
        devices: int,
        kv_pages: int,
        kv_page: int,
        router_pages: int,
        limits: Limits,
        context: int,
        dtype: str = "float32",
    ):
        check(folder, bank, devices)
        self.resident = True  # nothing is ever loaded
        self._mesh = make_mesh(MeshConfig(data=1, expert=devices))
        self.cfg, _, router_cfg = hf.read_config(Path(folder))
        params, _, router_params = hf.load_params(folder, dtype=jnp.dtype(dtype))
        assert router_cfg is not None, "more than one expert, so a router"
        self.router_cfg, self.bank, self.devices = router_cfg, bank, devices
        self.kv_page, self.context, self.dtype = kv_page, context, jnp.dtype(dtype)
        self._grid = mesh_segments.grid(limits, context, kv_page)
        self.kv_pages, self.router_pages = kv_pages, router_pages
        self.bytes_read = 0
        self.device_s = 0.0
        self._programs = Programs()
        self._pieces: list[collections.deque[Piece]] = [collections.deque() for _ in range(devices)]
        self.device = self._mesh.devices.flat[0]
        self._load(params, router_params)

    # ---- what lies on the devices -----------------------------------------------------------------

    def _load(self, params: dict[str, Any], router_params: Any) -> None:
        cfg, put, x = self.cfg, self._put, self.devices
        flat = params["layers"]
        # Shapes without memory: nothing is loaded after this.
        nothing = np.broadcast_to(np.zeros((), self.dtype), flat["w_gate"].shape)
        self.host_weights = nothing, nothing, nothing
        with jax.set_mesh(self._mesh):
            bank = parallel.separate_layout(params, self.bank.experts)["layers"]
        names = [name for name in parallel.BANK if name in bank]
        own = {name: parallel.WEIGHT if name.startswith("w") else parallel.BIAS for name in names}
        self._experts = [{n: put(np.asarray(bank[n][i], self.dtype), own[n]) for n in names} for i in range(cfg.layer)]
        self._top = put({name: w for name, w in params.items() if name != "layers"})
        self._layers = [put(paged.layer_weights(cfg, flat, index, self.dtype)) for index in range(cfg.layer)]
        self._windows = put(np.array(cfg.windows, np.int32)) if any(cfg.windows) else None
        shape = (x * (self.kv_pages + 1) * self.kv_page, cfg.kv_head * cfg.head_dim)  # each device has a scrap page
        self._caches = [Cache(*put((np.zeros(shape, self.dtype),) * 2, OWN)) for _ in range(cfg.layer)]
        r = self.router_cfg
        shape = (x * (r.layers * self.router_pages + 1) * self.kv_page, r.width)
        self._router = put(jax.tree.map(lambda w: w.astype(np.float32), router_params))
        self._router_cache = Cache(*put((np.zeros(shape, np.float32),) * 2, OWN))
        self._index = [put(np.int32(i)) for i in range(cfg.layer)]
        self._start, self._silent = {}, {}
        for b, t in self.shapes:
            self._start[b, t] = put(np.zeros((x * b, t, cfg.embed), self.dtype), OWN)
            if b not in self._silent:
                silent = np.full((x * b, self.context), cfg.vocab, np.int32), np.zeros((x * b, self.context), np.int32)
                self._silent[b] = put(sampling.History(*silent), OWN)  # pyright: ignore[reportArgumentType]
        self._layer_bytes = sum(w.nbytes for w in jax.tree.leaves(self._layers[0]))
        self._expert_bytes = sum(w.nbytes for w in jax.tree.leaves(self._experts[0])) // self.bank.experts
        self._head_bytes = self._top.get("head", self._top["embedding"]).nbytes

    def _put(self, tree: Any, partition: jax.P = REPLICATED) -> Any:
        def place(array):
            rest = (None,) * (np.ndim(array) - len(partition))
            return jax.NamedSharding(self._mesh, jax.P(*partition, *rest))

        return jax.device_put(tree, jax.tree.map(place, tree))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of the segments that are compiled, on each device."""
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

    def _own(self, function: Callable, split: Sequence[jax.P], result: Any = OWN) -> Callable:
        """The function on each device's part. Nothing inside looks at another device, and nothing is differentiated:
        the types that check both are switched off, which the loops of paged attention do not carry."""
        return jax.shard_map(function, in_specs=tuple(split), out_specs=result, check_vma=False)

    def _layer_program(self, weights, experts, embedding, cache, x_GTD, rows, route, windows, layer):
        def own(weights, embedding, cache, x_BTD, rows, windows, layer):
            x_BTD = jnp.where(layer == 0, embedding[rows.ids_BT].astype(x_BTD.dtype), x_BTD)
            window = None if windows is None else windows[layer]
            return paged.mix(self.cfg, weights, cache, x_BTD, rows, window, page=self.kv_page)

        split = (REPLICATED, REPLICATED, OWN, OWN, OWN, REPLICATED, REPLICATED)
        (x_GTD, normed_GTD), cache = self._own(own, split)(weights, embedding, cache, x_GTD, rows, windows, layer)
        with jax.named_scope("experts"):
            return x_GTD + parallel.ffn(normed_GTD, types.SimpleNamespace(**experts), route), cache

    def _last_program(self, x_GTD, last_G):
        def own(x_1TD, last_1):
            return jax.lax.dynamic_slice_in_dim(x_1TD, last_1[0], 1, axis=1)

        return self._own(own, (OWN, OWN))(x_GTD, last_G)

    def _finish_program(self, top, router_params, router_cache, x_G1D, draw, history, rows):
        def own(top, x_B1D, draw, history):
            return sampling.sample(paged.logits(self.cfg, top, x_B1D[:, 0]), draw, history)

        drawn = self._own(own, (REPLICATED, OWN, OWN, OWN))(top, x_G1D, draw, history)
        rows = dataclasses.replace(rows, ids_BT=drawn.token_B[:, None])
        expert_GT, router_cache = self._route_program(router_params, router_cache, rows)
        return jnp.stack([drawn.token_B, expert_GT[:, 0]]), drawn, router_cache

    def _route_program(self, params, cache, rows):
        cfg = self.router_cfg

        def own(q, k, v, index, cache, rows):
            return paged.router_attention(cfg, q, k, v, index, cache, rows, page=self.kv_page)

        def attend(q, k, v, index, cache):
            return self._own(own, (OWN, OWN, OWN, REPLICATED, OWN, OWN))(q, k, v, index, cache, rows)

        theta = self.cfg.rope_theta
        logits_GTE, cache = router.trunk(cfg, params, rows.ids_BT, rows.position_BT, theta, attend, cache)
        return jnp.argmax(logits_GTE, -1).astype(jnp.int32), cache

    def _jobs(self) -> list[Job]:
        """Every program."""
        jobs = []
        for b, t in self.shapes:
            x_GTD = self._start[b, t]
            rows, last_G = self._put((self._empty(b, t, self.kv_pages), np.zeros(self.devices * b, np.int32)), OWN)
            own = (self._layers[0], self._experts[0], self._top["embedding"], self._caches[0], x_GTD, rows)
            for size in mesh_segments.sizes(b, t, self.devices):
                nobody = np.zeros((self.devices * b, t), np.int32)
                route = self._exchange(nobody, nobody > 0, (size,))[1]
                layer = (*own, route, self._windows, self._index[0])
                jobs.append(Job(("layer", b, t, size), self._layer_program, layer, (3,)))
            if t > 1:
                jobs.append(Job(("last", t), self._last_program, (x_GTD, last_G), ()))
                jobs.append(Job(("route", t), self._route_program, (self._router, self._router_cache, rows), (1,)))
                continue
            requests: list[Request | None] = [None] * (self.devices * b)
            draw, new = self._put((sampling.host_rows(requests), self._empty(b, 1, self.router_pages)), OWN)
            finish = (self._top, self._router, self._router_cache, x_GTD, draw, self._silent[b], new)
            jobs.append(Job(("finish", b), self._finish_program, finish, (2,)))
        return jobs

    def compile(self, progress: bool = True) -> None:
        """Compile every program ahead, with a bar on a terminal; see `Programs`."""
        with jax.set_mesh(self._mesh):
            self._programs.compile(self._jobs(), progress)

    def close(self) -> None:
        """Give the devices' memory back."""
        self._programs.close()
        for name in ("_experts", "_top", "_layers", "_caches", "_router", "_router_cache", "_start", "_silent"):
            for array in jax.tree.leaves(self.__dict__.pop(name, None)):
                array.delete()

    # ---- experts on arrival -----------------------------------------------------------------------

    def route(self, tokens: Sequence[int], first: int, router_pages: Sequence[int]) -> list[Piece]:
        """The router on known tokens, the first of them at position `first`; see `fetch_experts`. It is sent with the
        next step, or when its experts are asked for: so several devices have work at once."""
        longest, device = self._grid.lengths[-1], router_pages[0] // self.router_pages
        pages, starts = np.array(router_pages, np.int32), range(0, len(tokens), longest)
        out = [Piece(device, list(tokens[start : start + longest]), first + start, pages) for start in starts]
        self._pieces[device] += out
        return out

    def _send_pieces(self) -> None:
        """Enqueue the router on all pieces that wait, one a device at a time, in their order."""
        while any(self._pieces):
            turn = [mine.popleft() for mine in self._pieces if mine]
            t = self._grid.fit(max(len(piece.ids) for piece in turn))
            rows = self._empty(1, t, self.router_pages)
            for piece in turn:
                self._fill(rows, piece.device, piece.ids, piece.start, piece.pages, piece.device, self.router_pages)
            program = self._programs["route", t]
            expert_XT, self._router_cache = program(self._router, self._router_cache, self._put(rows, OWN))
            for piece in turn:
                piece.expert_XT = expert_XT

    def fetch_experts(self, handle: list[Piece]) -> list[int]:
        """Expert of each token of a `route`, waiting for it."""
        if any(piece.expert_XT is None for piece in handle):
            self._send_pieces()
        began = time.perf_counter()
        fetched = jax.device_get([piece.expert_XT for piece in handle])
        self.device_s += time.perf_counter() - began
        return [e for piece, out_XT in zip(handle, fetched) for e in out_XT[piece.device, : len(piece.ids)].tolist()]

    # ---- steps ------------------------------------------------------------------------------------

    def _empty(self, b: int, t: int, pages: int) -> Rows:
        """Rows of padding on every device."""
        return segments.empty(self._grid, self.devices * b, t, pages * self.kv_page)

    def _fill(self, rows: Rows, row: int, ids, start: int, pages: Any, device: int, many: int) -> None:
        """A row of new tokens; pages: ids of a device that has `many`, which knows them from 0 on."""
        segments.fill(self._grid, rows, row, ids, start, np.asarray(pages, np.int32) - device * many)  # pyright: ignore

    def _exchange(self, expert_GT: np.ndarray, real_GT: np.ndarray, among: Sequence[int]):
        """(S, the plan on the devices) of a segment."""
        plan = routing.exchange(
            expert_GT[None], self.bank.experts, peers=self.devices, compiled=among, real_ABT=real_GT[None]
        )
        route = parallel.place(plan, lambda array, partition: self._put(array[0], jax.P(*partition[1:])))
        return plan.send_AGXS.shape[-1], route

    def _segment(self, batch: Batch, shape: tuple[int, int], places: list[list[int]]) -> Segment:
        (b, t), x, cfg = shape, self.devices, self.cfg
        rows, new = self._empty(b, t, self.kv_pages), self._empty(b, 1, self.router_pages)
        arrays: Any = rows
        real_GT, last_G = np.zeros((x * b, t), bool), np.zeros(x * b, np.int32)
        asked: list[Request | None] = [None] * (x * b)
        works = tuple((device * b + k, i) for device, mine in enumerate(places) for k, i in enumerate(mine))
        for row, i in works:
            work = batch.works[i]
            request, count, end = work.request, work.count, work.start + work.count
            self._fill(rows, row, request.tokens[work.start : end], work.start, request.pages, row // b, self.kv_pages)
            arrays.expert_BT[row, :count] = request.experts[work.start : end]
            real_GT[row, :count], last_G[row] = True, count - 1
            self.bytes_read += 2 * cfg.layer * cfg.kv_head * cfg.head_dim * self.dtype.itemsize * end
            if work.samples:
                asked[row] = request
                self._fill(new, row, [0], end, request.router_pages, row // b, self.router_pages)
        size, route = self._exchange(arrays.expert_BT, real_GT, mesh_segments.sizes(b, t, x))
        experts = len(np.unique(arrays.expert_BT[real_GT]))
        self.bytes_read += cfg.layer * (experts * self._expert_bytes + x * self._layer_bytes)
        rows, last_G = self._put((rows, last_G), OWN)
        draw = None
        if any(asked):
            self.bytes_read += x * self._head_bytes
            history = sampling.host_history(asked, self.context, cfg.vocab)
            draw = self._put((sampling.host_rows(asked), new), OWN)
            draw = (draw[0], self._silent[b] if history is None else self._put(history, OWN), draw[1])
        return Segment(works, shape, size, rows, last_G, route, draw)

    def step(self, batch: Batch, plan: StepPlan, before_pass: Callable[[int], None] | None = None) -> Flight:
        """Enqueue a step: every layer for every segment of the batch, then sampling and the router.

        plan, before_pass: not looked at, for all experts are where they belong.
        """
        self._send_pieces()  # whose pages a request of this batch may have by now
        parts = [self._segment(batch, *part) for part in mesh_segments.cut(self._grid, batch.works, self.devices)]
        streams = [self._start[segment.shape] for segment in parts]
        for layer in range(self.cfg.layer):
            for s, segment in enumerate(parts):
                streams[s], self._caches[layer] = self._programs["layer", *segment.shape, segment.size](
                    self._layers[layer],
                    self._experts[layer],
                    self._top["embedding"],
                    self._caches[layer],
                    streams[s],
                    segment.rows,
                    segment.route,
                    self._windows,
                    self._index[layer],
                )
        drawn = []
        for segment, x_GTD in zip(parts, streams):
            if segment.draw is not None:
                b, t = segment.shape
                x_G1D = x_GTD if t == 1 else self._programs["last", t](x_GTD, segment.last_G)
                pair_2G, rest, self._router_cache = self._programs["finish", b](
                    self._top, self._router, self._router_cache, x_G1D, *segment.draw
                )
                drawn.append((segment.works, pair_2G, rest))
        asked = [(work.samples, work.request.sampling.logprobs) for work in batch.works]
        best = tuple((-1 if most is None else most) if samples else SILENT for samples, most in asked)
        return Flight(tuple(drawn), best)

    def fetch(self, flight: Flight) -> list[sampling.Score | None]:
        """What each work of a step drew, None where it did not sample: the one place that waits for the devices."""
        began = time.perf_counter()
        wanted = [any(flight.best[i] >= 0 for _, i in works) for works, _, _ in flight.drawn]
        fetched = jax.device_get(
            [(pair, rest if want else None) for (_, pair, rest), want in zip(flight.drawn, wanted)]
        )
        self.device_s += time.perf_counter() - began
        out: list[sampling.Score | None] = [None] * len(flight.best)
        for (works, _, _), (pair_2G, rest) in zip(flight.drawn, fetched):
            for row, i in works:
                most = flight.best[i]
                if most != SILENT:
                    out[i] = sampling.score(pair_2G[:, row], rest, row, most)
        return out


def check(folder: str | Path, bank: Bank, devices: int) -> None:
    """ConfigError when this model cannot be spread over so many devices of this process."""
    rule = f"{folder}: mesh_expert={devices} needs separate experts: `readme-jax separate`"
    require(bank.storage == "separate", rule)
    there = jax.local_device_count()
    require(devices <= there, f"mesh_expert={devices} needs as many devices of this process, there are {there}")
    many = jax.process_count()
    require(many == 1, f"mesh_expert={devices}: an engine is one process, not {many}")
    require(bank.experts % devices == 0, f"experts={bank.experts} must be a multiple of mesh_expert={devices}")
