"""Comparisons on virtual machines: one case, several ways to serve it, one table.

A case is a model on a machine with a memory budget; its requests are the same for every way of serving.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from readme_jax import hf
from readme_jax.carve import EXPERTS, channels_of
from readme_jax.config import ConfigError, ModelConfig, RouterConfig, require
from readme_jax.serving import machines, optimum, report
from readme_jax.serving.bank import Bank, Storage
from readme_jax.serving.link import hidden_share
from readme_jax.serving.machines import Costs, Machine, Read
from readme_jax.serving.options import memory_bytes
from readme_jax.serving.simulate import Serving, Simulation
from readme_jax.serving.traces import RoutedRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A Read-ME model as the simulator knows it: dense sizes, its experts' channels, router, page table."""

    cfg: ModelConfig
    channels: int
    router: RouterConfig
    bank: Bank


def named_shape(
    model: str,
    *,
    experts: int = 7,
    fraction: float = 0.5,
    storage: Storage = "separate",
    overlap: float = 0.69,
    page: int | None = None,
    itemsize: int = 2,
) -> Shape:
    """The shape of a model that is not at hand (a name of `machines.MODELS`), or of a carved model's folder.

    A folder's own table gives experts, storage and overlap, and must not be contradicted by other arguments than
    page; ConfigError for an unknown name, a dense folder or a folder without weights.
    """
    if model in machines.MODELS:
        cfg = machines.MODELS[model]
        channels = channels_of(fraction, cfg.mlp)
        row = 3 * cfg.embed * itemsize
        bank = Bank.synthetic(
            layers=cfg.layer, experts=experts, channels=channels, row_bytes=row, storage=storage, page=page,
            mlp=cfg.mlp, overlap=overlap,
        )  # fmt: skip
        return Shape(cfg=cfg, channels=channels, router=RouterConfig(), bank=bank)
    folder = Path(model)
    known = ", ".join(machines.MODELS)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={model!r} is neither a carved model's folder nor one of {known}")
    cfg, carved, router = hf.read_config(folder)
    require(carved is not None, f"model={model}: is dense, it has no experts")
    assert carved is not None
    table_LEC = np.array(hf.Reader(folder).get(EXPERTS))
    separate = carved.storage == "separate"
    row = 3 * cfg.embed * itemsize
    bank = Bank.from_table(table_LEC, cfg.mlp, row_bytes=row, page=page, separate=separate)
    return Shape(cfg=cfg, channels=carved.channels, router=router or RouterConfig(), bank=bank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is served where: costs of the parts, expert pages, bytes for them, pages for keys and values."""

    costs: Costs
    bank: Bank
    expert_memory: int
    kv_pages: int


def make_case(
    shape: Shape,
    machine: Machine,
    expert_memory: str | int,
    *,
    kv_memory: str | int | None = None,
    read: Read = "touched",
    itemsize: int = 2,
    margin: float = 0.1,
) -> Case:
    """A model on a machine. expert_memory, kv_memory: as `options.memory_bytes`; no kv_memory: what is left.

    margin: share of device memory that stays free. ConfigError when it does not all fit, with what there is.
    """
    bank, cfg = shape.bank, shape.cfg
    costs = Costs(machine, cfg, shape.channels, shape.router, bank.experts, bank.page, itemsize, read)
    experts = memory_bytes(expert_memory, "expert_memory", bank.total_bytes)
    room = (1 - margin) * machine.device.memory - costs.fixed_bytes - experts
    each = Simulation.PAGE_TOKENS * (costs.kv_bytes + costs.router_kv_bytes)
    wanted = room if kv_memory is None else memory_bytes(kv_memory, "kv_memory")
    has = f"{machine.name} has {machine.device.memory / 1e9:.1f} GB, {margin:.0%} of it kept free"
    needs = f"expert pages need {experts / 1e9:.2f} GB, other weights {costs.fixed_bytes / 1e9:.2f} GB"
    require(room >= each, f"expert_memory={expert_memory}: no room for keys and values: {has}; {needs}")
    good = each <= wanted <= room
    require(good, f"kv_memory={kv_memory} must be {each} bytes, one page, to {int(room)}: {has}; {needs}")
    return Case(costs=costs, bank=bank, expert_memory=experts, kv_pages=int(wanted // each))


def run(
    case: Case,
    serving: Serving,
    jobs: Sequence[RoutedRequest],
    *,
    goal: dict[str, float] | None = None,
    least: bool = False,
    keep: bool = False,
    order: bool = False,
    seed: int = 0,
) -> tuple[dict, Simulation]:
    """Serve the jobs one way: figures and the simulation that gave them.

    Beside those of `report.figures`: hidden_share (see `link`), least_stall_s, link_busy_s, occupancy (of a batch's
    places), and of a work's wait in batches p99_wait, max_wait and wait_bound, which is the limit's at the most live
    requests there were (none: no bound). least: also count the loads of the offline optimum on the executed order.
    keep: remember every transfer and pass. order: remember the experts of every batch.
    """
    simulation = Simulation(
        case.costs, case.bank, serving, expert_memory=case.expert_memory, kv_pages=case.kv_pages, keep=keep,
        record=least, seed=seed,
    )  # fmt: skip
    simulation.order = [] if order else None
    simulation.run(jobs)
    fewest = None
    if least:
        assert simulation.residency.accesses is not None
        fewest = optimum.fewest_loads(simulation.residency.accesses, simulation.residency.slots)
    duration = simulation.clock - jobs[0].arrival
    figures = report.figures(simulation.requests, simulation.steps, duration, goal=goal, least_loads=fewest)
    return figures | own_figures(simulation, figures), simulation


def own_figures(simulation: Simulation, figures: dict) -> dict:
    """What only the simulation knows."""
    link, limits = simulation.link, simulation.serving.limits
    waits = sorted(simulation.scheduler.waits.items())
    counts = np.cumsum([count for _, count in waits])
    p99 = waits[int(np.searchsorted(counts, 0.99 * counts[-1]))][0]
    bounded = limits.max_wait is not None and simulation.serving.schedule in ("longest-queue", "expert-aware")
    most = max(step.live for step in simulation.steps)
    least_stall = simulation.optimum.stall
    return {
        "hidden_share": hidden_share(link.busy, figures["stall_s"], least_stall),
        "least_stall_s": least_stall,
        "link_busy_s": link.busy,
        "transfers": link.count,
        "occupancy": figures["mean_batch_requests"] / limits.batch_requests,
        "p99_wait": p99,
        "max_wait": waits[-1][0],
        "wait_bound": limits.max_wait * most / limits.batch_requests if bounded and limits.max_wait else None,
    }


def capacity(case: Case, serving: Serving, jobs: Iterable[RoutedRequest]) -> float:
    """Requests a second that a way of serving carries when all have come at once."""
    at_once = [dataclasses.replace(job, arrival=0.0) for job in jobs]
    simulation = Simulation(case.costs, case.bank, serving, expert_memory=case.expert_memory, kv_pages=case.kv_pages)
    simulation.run(at_once)
    return len(at_once) / simulation.clock


def at_rate(jobs: Sequence[RoutedRequest], rate: float) -> list[RoutedRequest]:
    """The same jobs with their arrivals stretched so that `rate` of them come a second on average."""
    span = jobs[-1].arrival - jobs[0].arrival
    require(len(jobs) > 1 and span > 0, "arrivals: a rate needs two requests at different times")
    scale = (len(jobs) - 1) / rate / span
    return [dataclasses.replace(job, arrival=(job.arrival - jobs[0].arrival) * scale) for job in jobs]


# ---- what is compared -----------------------------------------------------------------------------


def baseline(serving: Serving) -> Serving:
    """First come, first served, least recently used, loads on demand; the limits stay."""
    return dataclasses.replace(serving, schedule="fcfs", residency="lru", transfers="on-demand")


def ablation(serving: Serving) -> dict[str, Serving]:
    """From the baseline to `serving`, one part after the other."""
    base = baseline(serving)
    lookahead = dataclasses.replace(base, residency=serving.residency)
    ahead = dataclasses.replace(lookahead, transfers=serving.transfers)
    steps = {"fcfs + lru + on-demand": base, f"+ {serving.residency} residency": lookahead}
    if serving.transfers == "prefetch":
        steps["+ layer-ahead (paper)"] = dataclasses.replace(lookahead, transfers="layer-ahead")
    return steps | {f"+ {serving.transfers}": ahead, f"+ {serving.schedule} scheduling": serving}


def pairs(serving: Serving, schedules: Sequence[str], residencies: Sequence[str]) -> dict[str, Serving]:
    """Every pair of scheduling and residency policy."""
    return {
        f"{schedule} + {residency}": dataclasses.replace(serving, schedule=schedule, residency=residency)
        for schedule in schedules
        for residency in residencies
    }


def beside(results: dict[str, dict]) -> str:
    """One line a run of what the table leaves out, and the last run over the first."""
    lines = [
        f"{name}: transfers hidden {100 * r['hidden_share']:.1f} % of what could be, wasted {r['bytes_wasted']} bytes; "
        f"batches {r['mean_batch_requests']:.1f} of {r['mean_live']:.1f} live; wait p99 {r['p99_wait']}, most "
        f"{r['max_wait']} batches" + (f", bound {r['wait_bound']:.0f}" if r["wait_bound"] else "")
        for name, r in results.items()
    ]
    if len(results) > 1:
        first, *_, last = results.values()
        ratio = {key: last[key] / first[key] for key in ("mean_e2el_ms", "p95_e2el_ms", "output_throughput")}
        moved = first["bytes_moved"] / first["total_output_tokens"], last["bytes_moved"] / last["total_output_tokens"]
        less = f"{moved[0] / moved[1]:.2f} times fewer bytes moved a token" if moved[1] else "no bytes moved"
        lines.append(
            f"last over first: mean latency {ratio['mean_e2el_ms']:.3f}, p95 {ratio['p95_e2el_ms']:.3f}, "
            f"tokens/s {ratio['output_throughput']:.3f}; {less}"
        )
    return "\n".join(lines)
