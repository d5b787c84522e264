"""What an engine drives: scheduler, residency, pages, runner and transfers of one model, sized by the options."""

import collections
import dataclasses
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import api
from readme_jax.config import DataError, require
from readme_jax.serving import mesh_runner
from readme_jax.serving.bank import Bank
from readme_jax.serving.mesh_runner import MeshRunner
from readme_jax.serving.options import EngineOptions, memory_bytes
from readme_jax.serving.outputs import Counters
from readme_jax.serving.pages import PagePool
from readme_jax.serving.policies import Cost, Limits
from readme_jax.serving.recorder import Recorder
from readme_jax.serving.request import Batch, Reason, Request
from readme_jax.serving.residency import Residency, StepPlan
from readme_jax.serving.runner import Runner
from readme_jax.serving.sampling import Score
from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.transfers import HostRows, Transfers

ROUTE_TOKENS = 4096  # prompt tokens routed in a step at most: a rush of arrivals does not hold up those that run
AHEAD = 2  # batches that must be there to be chosen from for one to go out before the one before is back (docs/LOG.md)
LOAD_SIZES = (4, 32)  # pages of a transfer; one program each


class Parts:
    """See the module. counters: what the parts do not count themselves. context: tokens of the longest request."""

    def __init__(self, model: api.Model, options: EngineOptions, progress: bool, recorder: Recorder | None):
        cfg, carved, router = model.config, model.expert_config, model.router_config
        rule = f"{model.folder}: a dense model has no experts to serve by; carve it first, or use `readme-jax generate`"
        require(carved is not None and model.experts is not None, rule)
        assert carved is not None and model.experts is not None
        longest = cfg.max_position
        require(options.context <= longest, f"context={options.context} exceeds the model's {longest}")
        self.model, self.options, self.context = model, options, options.context or longest
        dtype = jnp.dtype(options.dtype)
        self.bank = Bank.from_table(
            model.experts, cfg.mlp, row_bytes=3 * cfg.embed * dtype.itemsize, page=options.expert_page or None,
            separate=carved.storage == "separate",
        )  # fmt: skip
        self._budget = memory_bytes(options.expert_memory, "expert_memory", whole=self.bank.total_bytes)
        if options.mesh_expert > 1:
            mesh_runner.check(model.folder, self.bank, options.mesh_expert)
            whole, given = self.bank.total_bytes, f"expert_memory={options.expert_memory!r}"
            rule = f"{given}: with mesh_expert={options.mesh_expert} all experts stay on the devices: 1.0x"
            require(self._budget >= whole, f"{rule}, {whole} bytes in all")
        slots = self.bank.slots(self._budget, options.mode)
        kv_pages = self._pages("kv_memory", 2 * cfg.layer * cfg.kv_head * cfg.head_dim * dtype.itemsize)
        router_pages = 0 if router is None else self._pages("router_memory", 8 * router.layers * router.width)
        self._kv_pages = kv_pages, router_pages
        self._limits = Limits(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Limits)})
        self._cost = Cost(
            read_bytes=self._read_bytes,
            fixed_bytes=4 * cfg.layer * cfg.embed * cfg.head * cfg.head_dim * dtype.itemsize,  # attention's weights
        )
        shape: dict[str, Any] = dict(
            kv_pages=kv_pages, kv_page=options.kv_page, context=self.context, router_pages=router_pages,
            limits=self._limits, dtype=options.dtype,
        )  # fmt: skip
        if options.mesh_expert > 1:
            self.runner = MeshRunner(model.folder, self.bank, devices=options.mesh_expert, **shape)
        else:
            # a step of several tokens reads all pages then, which must not be much more than it needs
            mostly = self.bank.items <= 2 * self.bank.least("column")
            resident = jax.default_backend() == "cpu" and slots >= self.bank.total and mostly
            shape |= dict(slots=slots, load_sizes=LOAD_SIZES, resident=resident)
            self.runner = Runner(model.folder, self.bank, **shape)
        self.runner.compile(progress)
        self.begin(options, recorder)

    def check(self, options: EngineOptions) -> None:
        """ConfigError unless `begin` can take these options."""
        self.bank.slots(self._budget, options.mode)
        dataclasses.replace(self._limits, max_wait=options.max_wait)

    def begin(self, options: EngineOptions, recorder: Recorder | None) -> None:
        """Begin with nothing: no requests, empty pages, counters at zero. options: of the same sizes as before."""
        self.options, self.recorder, self.counters = options, recorder, Counters()
        self.runner.device_s, self.runner.bytes_read = 0.0, 0
        self.residency = Residency(
            self.bank, self._budget, policy=options.residency, mode=options.mode, record=recorder is not None
        )
        devices, (kv_pages, router_pages) = range(options.mesh_expert), self._kv_pages
        if self.runner.resident:
            self.residency.fill()
        self.pools = [PagePool(kv_pages, options.kv_page, first=x * kv_pages) for x in devices]
        self.router_pools = [
            PagePool(router_pages, options.kv_page, first=x * router_pages) for x in devices if router_pages
        ]
        self._asked = [0] * len(devices)  # tokens that the requests of each device may come to
        limits = dataclasses.replace(self._limits, max_wait=options.max_wait)
        self.scheduler = Scheduler(options.schedule, limits, self.pools, self._cost)
        rows = HostRows(self.runner.host_weights, self.bank.order_LR, self.bank.page)
        self.transfers = Transfers(
            rows, self.runner.device, sizes=LOAD_SIZES, ahead=options.ahead, sent=recorder and recorder.sent
        )
        self.stop = weakref.finalize(self, self.transfers.close)  # called for an engine that nobody closes, too
        shape = len(devices) * router_pages, options.kv_page
        self._expert_of = np.zeros(shape, np.int16)  # of the tokens in router pages
        self._unrouted: collections.deque[Request] = collections.deque()
        self._routing: list[tuple[Request, int, Any]] = []
        self._route_told = 0.0  # seconds of routing that steps before have been given
        self._busy_since: float | None = None  # when the first of the batches on the device was sent there
        self._cached: dict[Request, int | None] = {}  # of requests that have arrived: prompt tokens found in pages

    def _read_bytes(self, experts: frozenset[int]) -> int:
        """Bytes of pages that a step with these experts reads, on the device that reads most."""
        if self.options.mesh_expert == 1 and self.runner.resident:
            return self.bank.items * self.bank.page_bytes
        sets, many = [experts], self.bank.experts // self.options.mesh_expert
        if self.options.mesh_expert > 1:
            sets = [[e for e in experts if e // many == x] for x in range(self.options.mesh_expert)]
        return max(map(self.bank.need_count, sets)) * self.bank.page_bytes

    def _pages(self, name: str, token_bytes: int) -> int:
        """Pages of keys and values that the option `name` has room for."""
        size, page = getattr(self.options, name), self.options.kv_page
        pages = memory_bytes(size, name) // (page * token_bytes)
        require(pages >= 1, f"{name}={size!r} must hold a page of {page} tokens: at least {page * token_bytes} bytes")
        return min(pages, 2**31 // page - 1)

    # ---- requests come and go ---------------------------------------------------------------------

    def check_room(self, tokens: int) -> None:
        """DataError when a request of so many tokens, prompt and output, fits into no pages at all."""
        for name, pools in (("kv_memory", self.pools), ("router_memory", self.router_pools)):
            for pool in pools[:1]:  # all are alike
                need, value = pool.pages_for(tokens), getattr(self.options, name)
                message = f"a request of {tokens} tokens needs {need} pages; {name}={value!r} holds {pool.pages}"
                require(need <= pool.pages, message, DataError)

    def arrive(self, request: Request) -> None:
        """A request is here: it is routed with the next step."""
        if not self.router_pools:
            request.experts = [0] * len(request.tokens)
        self._pin(request)
        self.scheduler.add(request)
        self._cached[request] = None
        if self.router_pools:
            self._unrouted.append(request)

    def _pin(self, request: Request) -> None:
        """Its device for life: where its pages and those that others there may come to are fewest, without the pages
        of its prefix that lie there."""
        self.pools[0].digest(request.tokens, request.digests)
        room = [-asked + pool.known(request.digests) for asked, pool in zip(self._asked, self.pools)]
        request.device = room.index(max(room))
        self._asked[request.device] += len(request.prompt) + request.sampling.max_new_tokens

    def leave(self, request: Request, reason: Reason) -> int:
        """It has ended, or is to; the prompt tokens that it found in pages. On the device it is run to its end."""
        self.counters.finished[reason] += 1
        if request not in self._cached:  # it never arrived
            request.state, request.reason = "finished", reason
            return 0
        self.scheduler.finish(request, reason)
        self._asked[request.device] -= len(request.prompt) + request.sampling.max_new_tokens
        if self.router_pools:
            # calls that still write to these pages were made before those of whoever gets them next
            self.router_pools[request.device].release(request.router_pages)
        return self._cached.pop(request) or 0

    # ---- pre-gating -------------------------------------------------------------------------------

    def route(self, idle: bool) -> None:
        """Route the prompts that have arrived. Experts are fetched with the next call, behind the batch that is sent
        off meanwhile, or at once if the engine is idle and has nothing else to run."""
        start = time.perf_counter()
        self._routed()
        room = ROUTE_TOKENS
        while self._unrouted and room > 0:
            request = self._unrouted[0]
            if request.state != "finished":
                if not self._reserve(request):
                    break
                first = len(request.experts)
                if first == len(request.tokens):  # all in pages of others
                    self.scheduler.routed(request)
                else:
                    handle = self.runner.route(request.tokens[first:], first, request.router_pages)
                    self._routing.append((request, first, handle))
                    room -= len(request.tokens) - first
            self._unrouted.popleft()
        if idle and not self.scheduler.live:
            self._routed()
        self.counters.route_s += time.perf_counter() - start

    def _reserve(self, request: Request) -> bool:
        """Router pages for all that the request may come to, those of a known prefix with their experts among them."""
        pool, page, held = self.router_pools[request.device], self.options.kv_page, request.router_pages
        pool.share(held, request.digests, len(request.tokens) // page)
        request.experts = self._expert_of[held].ravel().tolist()
        if pool.grow(held, len(request.tokens) + request.sampling.max_new_tokens):
            return True
        pool.release(held)
        request.experts.clear()
        return False

    def _routed(self) -> None:
        """Experts of the prompts sent to the router before."""
        page = self.options.kv_page
        for request, first, handle in self._routing:
            experts = self.runner.fetch_experts(handle)
            self.counters.routed += len(experts)
            if request.state == "finished":
                continue
            request.experts += experts
            place_T = np.arange(first, first + len(experts))
            self._expert_of[np.array(request.router_pages)[place_T // page], place_T % page] = experts
            pool = self.router_pools[request.device]
            pool.seal(request.router_pages, request.digests, first, len(request.tokens))
            self.scheduler.routed(request)
        self._routing.clear()

    @property
    def waiting(self) -> bool:
        """Whether prompts are with the router, whose experts the next step will know."""
        return bool(self._routing)

    # ---- a batch ----------------------------------------------------------------------------------

    def full(self) -> bool:
        """Whether what could run now, beside what runs, fills AHEAD batches."""
        limits = self.scheduler.limits
        left = [request.left for request in self.scheduler.live if request.left > 0]
        tokens = sum([min(count, limits.chunk) for count in left])
        return len(left) >= AHEAD * limits.batch_requests or tokens >= AHEAD * limits.batch_tokens

    def launch(self, now: float) -> tuple[Batch, Any, dict] | None:
        """Choose the next batch, plan its pages and send both on their way; None when nothing can run now.

        Returns the batch, what `fetch` takes, and the batch's figures for a recorder.
        """
        page_bytes = self.bank.page_bytes
        batch = self.scheduler.schedule(now, lambda experts: self.residency.missing(experts) * page_bytes)
        if batch is None:
            return None
        counts: collections.Counter[int] = collections.Counter()
        for work in batch.works:
            counts.update(work.request.experts[work.start : work.start + work.count])
            if self._cached.get(work.request, 0) is None:
                self._cached[work.request] = min(work.start, len(work.request.prompt))
        before = dataclasses.replace(self.residency.counters)
        looks = (self.options.residency == "lookahead" and not self.runner.resident) or self.recorder is not None
        future = self.scheduler.upcoming(self.options.lookahead) if looks else []
        plan = self.residency.plan(batch.experts, future, counts)
        if self.recorder is not None:
            self.recorder.planned.append((batch.experts, tuple(future), dict(counts)))
        loads: dict[int, list] = {}
        if plan.loads:
            for index in range(plan.passes):
                items, slots, _, _ = plan.loads_of(index)
                if len(items):
                    loads[index] = self.transfers.issue(items, slots)

        def before_pass(index: int) -> None:
            self._sent_off()  # what the step takes has been made: the device begins
            # After every call that reads what the slots held, before the first that reads what they get.
            for load in loads.get(index, ()):
                assert not isinstance(self.runner, MeshRunner), "all pages are there"
                self.runner.insert(load.slots, self.transfers.take(load))

        stall = self.transfers.moved.stall_s
        handle = self.runner.step(batch, plan, before_pass)
        self._sent_off()
        seen = self._count(batch, counts, plan, before) | {"stall": self.transfers.moved.stall_s - stall}
        return batch, handle, seen

    def _sent_off(self) -> None:
        """From now on the device has work, if it had none."""
        if self._busy_since is None:
            self._busy_since = time.perf_counter()

    def land(self, handle: Any) -> list[Score | None]:
        """Results of the oldest batch on the device, for each work: None where it samples nothing. Waits for them."""
        results = self.runner.fetch(handle)
        if self.scheduler.flying == 1 and self._busy_since is not None:
            self.counters.busy_s += time.perf_counter() - self._busy_since
            self._busy_since = None
        return results

    def _count(self, batch: Batch, experts: collections.Counter[int], plan: StepPlan, before: Any) -> dict[str, Any]:
        after, counters = self.residency.counters, self.counters
        decode = sum(1 for work in batch.works if work.count == 1 and work.samples)
        route_s, self._route_told = counters.route_s - self._route_told, counters.route_s
        counters.steps += 1
        counters.tokens += batch.tokens
        counters.decode += decode
        counters.unique_experts += len(experts)
        return {
            "requests": len(batch.works),
            "prefill": batch.tokens - decode,
            "decode": decode,
            "experts": len(experts),
            "pages": after.pages_read - before.pages_read,
            "missing": plan.loads,
            "hit_tokens": after.token_layer_hits - before.token_layer_hits,
            "layers": self.bank.layers,
            "page_bytes": self.bank.page_bytes,
            "moved": plan.loads * self.bank.page_bytes,
            "waves": max(collections.Counter(plan.layers).values()),
            "route": route_s,
        }

    def complete(self, batch: Batch, results: list[Score | None], now: float) -> list[Request]:
        """Hand the results of a batch to the scheduler; the requests that got a token."""
        pairs = [None if result is None else (result.token, result.expert) for result in results]
        got = self.scheduler.complete(batch, pairs, now)
        page = self.options.kv_page
        self.counters.generated += len(got)
        if not self.router_pools:
            return got
        for request in got:
            place = len(request.tokens) - 1
            self._expert_of[request.router_pages[place // page], place % page] = request.experts[-1]
            if len(request.tokens) % page == 0:
                pool = self.router_pools[request.device]
                pool.seal(request.router_pages, request.digests, place, place + 1)
        return got

    # ---- figures ----------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """See `Engine.stats`."""
        counters, pages, moved = self.counters, self.residency.counters, self.transfers.moved
        scheduler, steps = self.scheduler, max(self.counters.steps, 1)
        waits = scheduler.waits
        works = max(sum(waits.values()), 1)
        figures: dict[str, Any] = {
            "requests_live": len(scheduler.live),
            "requests_waiting": scheduler.waiting,
            "preemptions": scheduler.preemptions,
            "steps": counters.steps,
            "tokens_run": counters.tokens,
            "tokens_generated": counters.generated,
            "tokens_routed_on_arrival": counters.routed,
            "tokens_from_prefix": sum([pool.reused_tokens for pool in self.pools]),
            "kv_pages": sum([pool.pages for pool in self.pools]),
            "kv_pages_used": sum([pool.pages - pool.available for pool in self.pools]),
            "expert_pages": self.bank.total,
            "expert_slots": self.residency.slots,
            "expert_page_bytes": self.bank.page_bytes,
            "bytes_read": pages.bytes_read,
            "bytes_read_device": self.runner.bytes_read,
            "bytes_loaded": moved.bytes,
            "bytes_prefetch": moved.prefetch_bytes,
            "bytes_demand": moved.demand_bytes,
            "evictions": pages.evictions,
            "waves": pages.waves,
            "stall_s": moved.stall_s,
            "hit_ratio_bytes": pages.hit_ratio,
            "hit_ratio_tokens": pages.token_hit_ratio,
            "unique_experts_per_batch": counters.unique_experts / steps,
            "unique_pages_per_batch": pages.pages_read / steps,
            "requests_per_batch": sum(waits.values()) / steps,
            "reorder_batches_mean": sum(wait * count for wait, count in waits.items()) / works,
            "reorder_batches_max": max(waits, default=0),
            "step_s": counters.step_s,
            "busy_s": counters.busy_s,
            "host_share": max(0.0, 1 - counters.busy_s / counters.step_s) if counters.step_s else 0.0,
            "route_s": counters.route_s,
            "device_s": self.runner.device_s,
            "programs": self.runner.programs,
            "compiles_after_start": self.runner.compiles,
        }
        return figures | {f"requests_{reason}": count for reason, count in counters.finished.items()}
