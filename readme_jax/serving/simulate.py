"""Serving on a virtual clock: the engine's scheduler, pages and residency, a virtual link, a compute model.

The loop is the engine's. Where more requests are live than a batch takes, batch t + 1 is chosen, of requests whose next
token is known, as batch t begins, so that its pages travel under t. Each pass of a step begins when the pass before it
has ended and its pages are there.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from readme_jax.config import require
from readme_jax.serving.bank import Bank
from readme_jax.serving.link import Load, Optimum, VirtualLink, batched
from readme_jax.serving.machines import Costs, Rows
from readme_jax.serving.pages import PagePool
from readme_jax.serving.policies import Cost, Limits, Policy
from readme_jax.serving.report import Served, Step
from readme_jax.serving.request import Batch, Request, SamplingParams
from readme_jax.serving.residency import Mode, Residency, StepPlan
from readme_jax.serving.residency import Policy as ResidencyPolicy
from readme_jax.serving.scheduler import Scheduler
from readme_jax.serving.traces import RoutedRequest

Transfer = Literal["on-demand", "layer-ahead", "prefetch"]
TRANSFERS: tuple[Transfer, ...] = ("on-demand", "layer-ahead", "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """How requests are served: what is compared."""

    schedule: Policy = "expert-aware"
    """Which requests make up a batch."""
    residency: ResidencyPolicy = "lookahead"
    """Which expert pages are evicted."""
    residency_mode: Mode = "layer"
    """layer: pages of a layer may go as soon as the step is past it; column: an expert's layers stay together."""
    transfers: Transfer = "prefetch"
    """on-demand: a pass asks for its pages as it begins. layer-ahead: as the pass before it begins (the paper).
    prefetch: as soon as the batch is chosen."""
    limits: Limits = Limits()
    """What a batch may hold."""
    ahead: float = 2.0
    """With prefetch, the next batch is chosen while one runs if the requests that could run are at least this many
    times batch_requests. With fewer the batches would be small, and small batches cost more than what they hide."""
    lookahead: int = 64
    """Batches to come that the lookahead policy is told of."""
    part: int = 4 << 20
    """Bytes of a transfer after which one with an earlier deadline may go first."""

    def __post_init__(self):
        require(self.transfers in TRANSFERS, f"transfers={self.transfers!r} is not one of {', '.join(TRANSFERS)}")
        require(self.lookahead >= 0, f"lookahead={self.lookahead} must not be negative")
        require(self.part >= 1, f"part={self.part} must be at least 1")


@dataclasses.dataclass(slots=True)
class Planned:
    """A step that is committed: its batch, its plan, and what each pass costs and waits for."""

    batch: Batch
    plan: StepPlan
    rows: Rows
    seconds: list[float]
    loads: dict[int, list[Load]]  # by pass of the step
    decided: float | int  # a moment, or the pass that was about to begin
    live: int
    hit_tokens: float
    wasted: int


class Simulation:
    """One run. Requests and steps that have ended are appended to `requests` and `steps`.

    costs: of the model on a machine. bank: its expert pages. expert_memory: bytes of the pool of expert pages.
    kv_pages: pages of 16 tokens of KV cache. keep: remember every transfer and pass. record:
    as `Residency`. `run` once.
    """

    PAGE_TOKENS = 16

    def __init__(
        self,
        costs: Costs,
        bank: Bank,
        serving: Serving,
        *,
        expert_memory: int,
        kv_pages: int,
        keep: bool = False,
        record: bool = False,
        requests: Any = None,
        steps: Any = None,
        seed: int = 0,
    ):
        machine = costs.machine
        self.costs, self.bank, self.serving = costs, bank, serving
        self.link = VirtualLink(machine.link_rate, machine.assumed.latency, part=serving.part, keep=keep)
        self.residency = Residency(
            bank, expert_memory, policy=serving.residency, mode=serving.residency_mode, seed=seed, record=record
        )
        self.pool = PagePool(kv_pages, self.PAGE_TOKENS, reuse=False)
        fixed = costs.cfg.layer * machine.assumed.layer_overhead + machine.assumed.step_overhead
        cost = Cost(
            read_bytes=lambda experts: bank.need_count(experts) * float(bank.page_bytes),
            fixed_bytes=costs.fixed_bytes + fixed * machine.bandwidth,
            load=machine.bandwidth / machine.link_rate,
        )
        self.scheduler = Scheduler(serving.schedule, serving.limits, self.pool, cost)
        self.optimum = Optimum()
        self.requests: Any = [] if requests is None else requests
        self.steps: Any = [] if steps is None else steps
        self.clock = 0.0
        self.order: list[frozenset[int]] | None = None  # experts of each batch, where a list is put here
        self.passes: list[tuple[float, float]] | None = [] if keep else None  # when each pass computed
        self._times: dict[Request, tuple[RoutedRequest, list[float]]] = {}
        self._fresh = np.zeros(self.residency.slots, bool)  # slots loaded and not read yet
        self._number = 0
        self._routing = 0.0

    @property
    def pending(self) -> int:
        """Requests that are known here and have not ended."""
        return len(self._times)

    # ---- the loop -----------------------------------------------------------------------------

    def run(self, jobs: Iterable[RoutedRequest]) -> None:
        """Serve all jobs, which come in order of arrival."""
        coming = iter(jobs)
        self._next = next(coming, None)
        self._coming: Iterator[RoutedRequest] = coming
        following: Planned | None = None
        while True:
            if following is None:
                self._admit(self.clock)
                following = self._decide(self.clock, self.clock)
            if following is None:
                if self._next is None:
                    break
                self.clock = max(self.clock, self._next.arrival)
                continue
            step, following = following, None
            following = self._play(step)
        require(self.scheduler.unfinished == 0, f"{self.scheduler.unfinished} requests cannot run")

    def _admit(self, now: float) -> None:
        """What has come until now, routed at once: the router's time is taken before the next step."""
        while self._next is not None and self._next.arrival <= now:
            job = self._next
            prompt, first = len(job.prompt_experts), self._number * 1_000_000
            sampling = _sampling(len(job.output_experts))
            request = Request(list(range(first, first + prompt)), sampling, job.arrival)  # ids that no other prompt has
            request.experts = job.prompt_experts.tolist()
            self._times[request] = (job, [])
            self._number += 1
            self.scheduler.add(request)
            self._routing += self.costs.route(prompt, prompt)
            self._next = next(self._coming, None)

    def _decide(self, now: float, decided: float | int) -> Planned | None:
        """Commit the next batch and, where they may travel already, its loads."""
        residency, serving = self.residency, self.serving
        size = self.bank.page_bytes
        batch = self.scheduler.schedule(now, lambda experts: residency.missing(experts) * size)
        if batch is None:
            return None
        tokens: Counter[int] = Counter()
        for work in batch.works:
            if work.count == 1:
                tokens[work.request.experts[work.start]] += 1
            else:
                tokens.update(work.request.experts[work.start : work.start + work.count])
        future = self.scheduler.upcoming(serving.lookahead) if serving.residency == "lookahead" else ()
        before = residency.counters.token_layer_hits
        plan = residency.plan(batch.experts, future, tokens)
        rows = _rows(batch)
        step = Planned(
            batch, plan, rows, self._seconds(rows, plan), self._loads(plan), decided, len(self.scheduler.live),
            residency.counters.token_layer_hits - before, self._mark(plan),
        )  # fmt: skip
        if serving.transfers == "prefetch":
            for loads in step.loads.values():
                self.link.issue(loads, now)
        return step

    def _decide_ahead(self, now: float, decided: float | int) -> Planned | None:
        """The batch after the one that runs, if there is something to move for it and enough that could run."""
        if self.serving.transfers != "prefetch":
            return None
        scheduler, limits = self.scheduler, self.serving.limits
        ready = sum([request.left > 0 for request in scheduler.live])
        ready += min(scheduler.waiting, limits.max_live - len(scheduler.live))
        return self._decide(now, decided) if ready >= self.serving.ahead * limits.batch_requests else None

    def _play(self, step: Planned) -> Planned | None:
        """Run a step; returns the one after it, if it was chosen meanwhile."""
        link, plan, transfers = self.link, step.plan, self.serving.transfers
        start = clock = self.clock
        stall, routing, self._routing = 0.0, self._routing, 0.0
        step.seconds[0] += routing
        self._admit(clock)
        following = self._decide_ahead(clock, plan.first_pass)
        for i, seconds in enumerate(step.seconds):
            if following is None and self._next is not None and self._next.arrival <= clock:
                arrival = max(start, self._next.arrival)
                self._admit(clock)
                following = self._decide_ahead(clock, arrival)
            number = plan.first_pass + i
            if i in step.loads:
                if transfers == "on-demand" or transfers == "layer-ahead" and not i:
                    link.issue(step.loads[i], clock)
                begin = link.ready(number, clock)
                stall, clock = stall + begin - clock, begin
            if transfers == "layer-ahead" and i + 1 in step.loads:
                link.issue(step.loads[i + 1], clock)
            if self.passes is not None:
                self.passes.append((clock, clock + seconds))
            clock += seconds
            link.freed(number, clock)
        waits = [[(load.after, link.seconds(load.size)) for load in step.loads.get(i, ())] for i in range(plan.passes)]
        route = self.costs.route(step.rows.sampled, step.rows.context // len(step.batch.works))
        tail = self.costs.head(step.rows) + route
        self.optimum.step(plan.first_pass, step.decided, step.seconds, waits, tail)
        self.clock = clock + tail
        self._finish(step, start, stall, routing + route)
        return following

    def _finish(self, step: Planned, start: float, stall: float, route: float) -> None:
        """Hand out the tokens of a step that has ended and note down what it was."""
        batch, plan, now = step.batch, step.plan, self.clock
        if self.order is not None:
            self.order.append(batch.experts)
        sampled = []
        for work in batch.works:
            if work.samples:
                ahead = self._times[work.request][0].output_experts
                sampled.append((0, int(ahead[work.request.generated])))
            else:
                sampled.append(None)
        for request in self.scheduler.complete(batch, sampled, now):
            job, times = self._times[request]
            times.append(now)
            if len(times) == len(job.output_experts):
                self.scheduler.finish(request, "length")
                del self._times[request]
                served = Served(
                    job.arrival, times, len(job.prompt_experts), False, request.passed_over, request.preempted
                )
                self.requests.append(served)
        size = self.bank.page_bytes
        self.steps.append(
            Step(
                start=start,
                end=now,
                stall=stall,
                requests=len(batch.works),
                prefill=step.rows.prefill,
                decode=step.rows.decode,
                live=step.live,
                experts=len(batch.experts),
                pages=len(plan.items),
                missing=plan.loads,
                hit_tokens=step.hit_tokens,
                layers=self.bank.layers,
                page_bytes=size,
                moved=plan.loads * size,
                wasted=step.wasted,
                waves=1 + plan.passes - self.bank.layers,
                route=route,
            )
        )

    # ---- what a step costs ----------------------------------------------------------------------

    def _seconds(self, rows: Rows, plan: StepPlan) -> list[float]:
        """Compute of each pass; the attention of a layer belongs to its first pass."""
        costs = self.costs
        seconds_P = costs.ffn(rows, np.diff(plan.read), self.bank.pages) + costs.machine.assumed.layer_overhead
        attention = costs.attention(rows)
        if plan.passes == self.bank.layers:
            return (seconds_P + attention).tolist()
        first_P = np.diff(np.asarray(plan.layers), prepend=-1) > 0
        return (seconds_P + attention * first_P).tolist()

    def _loads(self, plan: StepPlan) -> dict[int, list[Load]]:
        """The transfers that each pass waits for, of those that wait for any."""
        loads, size = {}, self.bank.page_bytes
        if plan.loads:
            for i in range(plan.passes):
                if plan.load[i] < plan.load[i + 1]:
                    items, slots, _, after = plan.loads_of(i)
                    loads[i] = batched(plan.first_pass + i, items, slots, after, size)
        return loads

    def _mark(self, plan: StepPlan) -> int:
        """Bytes that an earlier load brought and that this plan overwrites before any pass has read them."""
        wasted, fresh = 0, self._fresh
        for i in range(plan.passes if plan.loads else 0):
            _, slots, _, _ = plan.loads_of(i)
            wasted += int(fresh[slots].sum())
            fresh[slots] = True
            fresh[plan.reads_of(i)[1]] = False
        return wasted * self.bank.page_bytes


@functools.cache
def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, ignore_eos=True)


def _rows(batch: Batch) -> Rows:
    decode = prefill = sampled = context = square = 0
    for work in batch.works:
        if work.count == 1:
            decode += 1
        else:
            prefill += work.count
        sampled += work.samples
        context += work.start + work.count
        square += work.count * work.start + work.count * (work.count + 1) // 2
    return Rows(decode=decode, prefill=prefill, sampled=sampled, context=context, square=square)
