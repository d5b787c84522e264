"""Serving of a Read-ME model on a machine that is not at hand: latency, throughput, hits and bytes by policy.

readme-jax simulate --model llama2-7b --machine a100-80 --expert-memory 0.25x --policies ablation
readme-jax simulate --config configs/llama2-7b-paper/simulate.yaml

The scheduler and the residency are the engine's; device and link are numbers on a virtual clock. In: a model by name or
a carved folder, a machine, a trace or the generator. Out: a table, `--json FILE`, pictures with `--plots DIR`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from readme_jax import artifacts, cli
from readme_jax.config import require, to_dict
from readme_jax.metrics import progress
from readme_jax.serving import machines, paper, plots, report, study, trace_files, traces
from readme_jax.serving.machines import Assumed
from readme_jax.serving.policies import POLICIES as SCHEDULES
from readme_jax.serving.residency import POLICIES as RESIDENCIES
from readme_jax.serving.simulate import Serving, Simulation
from readme_jax.serving.study import Case
from readme_jax.serving.traces import ArrivalsConfig, RoutedRequest, RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """One comparison."""

    model: str = "llama2-7b"
    """llama2-7b, llama2-13b, llama2-70b, smollm2-135m, or the folder of a carved model."""
    machine: str = "a100-80"
    """a100-40, a100-80, h100, h100-pcie, h200, gh200, v5e, v5p or v6e."""
    assumed: Assumed = Assumed()
    """What of the machine's peaks is reached, and what nothing hides."""
    storage: Literal["separate", "tied"] = "separate"
    """Expert storage of a model by name: as the paper exports it, or ours."""
    fraction: float = 0.5
    """Share of the FFN channels of one expert, of a model by name."""
    overlap: float = 0.69
    """Share of their channels that two tied experts have in common, of a model by name."""
    page: int = 0
    """Channels of an expert page; 0: a whole expert's of a layer when separate, else by the width of the FFN."""
    expert_memory: tuple[str, ...] = ("0.25x",)
    """Bytes for expert pages: 2GiB, or 0.25x of all of them. With several, pictures show figures against memory."""
    kv_memory: str = ""
    """Bytes for keys and values; empty: what the device has left."""
    read: Literal["touched", "all"] = "touched"
    """What decoding reads of a layer's FFN: pages of the batch's experts, or all."""
    trace: Path | None = None
    """Requests: Azure CSV, BurstGPT CSV, ShareGPT JSON or our JSONL; none: drawn, see `arrivals`."""
    routed: Path | None = None
    """A routing trace that an engine recorded: requests with their experts; then nothing is drawn."""
    limit: int = 1000
    """Requests to serve at most."""
    arrivals: ArrivalsConfig = ArrivalsConfig(
        requests=1000, rate=1.0, burstiness=0.5, prompt_mean=128, prompt_sigma=0.6, output_mean=128, output_sigma=0.6
    )
    """Drawn requests; their rate counts if `load` is 0."""
    routing: RouterConfig = RouterConfig()
    """How drawn experts follow one another; `experts` also of a model by name."""
    context: int = 4096
    """Requests are cut to so many tokens."""
    load: float = 0.8
    """Requests come at this share of what fcfs + lru + on-demand carries; 0: when the trace says."""
    policies: Literal["one", "baseline", "ablation", "all"] = "baseline"
    """one: `serving` alone. baseline: beside fcfs + lru + on-demand. ablation: every step between. all: every pair."""
    serving: Serving = Serving()
    """How requests are served."""
    goodput: dict[str, float] = dataclasses.field(default_factory=dict)
    """Limits in ms by latency (ttft, tpot, e2el) that a request must keep to count as good."""
    optimum: bool = False
    """Also count the loads of the offline optimum on each executed order."""
    paper: bool = False
    """Print hit ratios, experts of a batch and latencies beside the paper's."""
    seed: int = 0
    """Of everything that is drawn."""
    json: Path | None = None
    """File to write the figures to."""
    plots: Path | None = None
    """Folder to write pictures to."""

    def __post_init__(self):
        require(self.limit >= 2, f"limit={self.limit} must be at least 2")
        require(self.load >= 0, f"load={self.load} must not be negative")
        require(not (self.trace and self.routed), "trace and routed are both given")
        require(self.page >= 0, f"page={self.page} must not be negative")
        require(len(self.expert_memory) > 0, "expert_memory: none given")
        require(not self.paper or self.routing.experts == paper.EXPERTS, f"paper: has {paper.EXPERTS} experts")


def main(argv: list[str] | None = None) -> None:
    """Simulate once: print the table, write figures and pictures where asked to."""
    config: SimulateConfig = cli.parse(SimulateConfig, argv, __doc__ or "", prog="readme-jax simulate")
    if config.json:
        require(not config.json.is_dir(), f"json={config.json}: is a folder")
    for folder in filter(None, (config.json and config.json.parent, config.plots)):
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the runs
    machine = machines.find(config.machine, config.assumed)
    cases = {memory: case_of(config, memory) for memory in config.expert_memory}
    first = cases[config.expert_memory[0]]
    requests = read_requests(config, first)
    print(heading(machine, first, requests))
    results, latencies, shown = {}, {}, None
    for memory, case in cases.items():
        results[memory] = {}
        ways = chosen(config, case)
        with progress(len(ways), memory, "run") as bar:
            for name, (place, serving) in ways.items():
                keep = config.plots is not None and serving == config.serving and case is first
                results[memory][name], run = study.run(
                    place, serving, requests, goal=config.goodput or None, least=config.optimum, keep=keep,
                    seed=config.seed,
                )  # fmt: skip
                shown = run if keep else shown
                if case is first:
                    latencies[name] = report.latencies(run.requests)["e2el"] / 1e3
                bar.update(1)
        print(f"\nexpert memory {memory}: {case.expert_memory / 1e9:.2f} GB of {case.bank.total_bytes / 1e9:.2f}")
        print(report.table(results[memory]))
        print(study.beside(results[memory]))
    out: dict = {"config": to_dict(config), "results": results}
    if config.paper:
        out["paper"] = paper.figures(first, config.serving, requests)
        print("\n" + paper.table(out["paper"]))
    if config.json:
        artifacts.write_text(config.json, json.dumps(out, indent=2) + "\n")
    if config.plots:
        draw(config, cases, results, latencies, shown)
        print(f"pictures: {config.plots}")


def case_of(config: SimulateConfig, memory: str | int, storage: study.Storage | None = None) -> Case:
    """The model on the machine with this much memory for experts."""
    shape = study.named_shape(
        config.model, experts=config.routing.experts, fraction=config.fraction, storage=storage or config.storage,
        overlap=config.overlap, page=config.page or None,
    )  # fmt: skip
    machine = machines.find(config.machine, config.assumed)
    return study.make_case(shape, machine, memory, kv_memory=config.kv_memory or None, read=config.read)


def read_requests(config: SimulateConfig, case: Case) -> list[RoutedRequest]:
    """The requests with their experts, at the load that is asked for."""
    experts = case.bank.experts
    if config.routed:
        count, found = trace_files.read_routing(config.routed)
        require(count == experts, f"routed={config.routed}: has {count} experts, the model {experts}")
        found = found[: config.limit]
    else:
        lengths = trace_files.read_trace(config.trace) if config.trace else traces.generate(config.arrivals)
        lengths = traces.clip(lengths[: config.limit], config.context)
        found = list(traces.route(lengths, dataclasses.replace(config.routing, experts=experts)))
    if not config.load:
        return found
    return study.at_rate(found, config.load * study.capacity(case, study.baseline(config.serving), found))


def chosen(config: SimulateConfig, case: Case) -> dict[str, tuple[Case, Serving]]:
    """What is compared, by name: where it is served and how."""
    serving = config.serving
    ours = f"{serving.schedule} + {serving.residency} + {serving.transfers}"
    if config.policies == "one":
        return {ours: (case, serving)}
    if config.policies == "baseline":
        return {"fcfs + lru + on-demand": (case, study.baseline(serving)), ours: (case, serving)}
    if config.policies == "all":
        residencies = (*RESIDENCIES[1:], RESIDENCIES[0])  # ours last
        return {name: (case, way) for name, way in study.pairs(serving, list(SCHEDULES), residencies).items()}
    steps = {name: (case, way) for name, way in study.ablation(serving).items()}
    if config.model in machines.MODELS and config.storage == "separate":
        tied = case_of(config, case.expert_memory, "tied")
        steps["+ tied pages"] = (tied, serving)
    return steps


def heading(machine: machines.Machine, case: Case, requests: list[RoutedRequest]) -> str:
    """What is simulated, with the assumptions that the figures rest on."""
    bank, cfg, assumed = case.bank, case.costs.cfg, machine.assumed
    span = requests[-1].arrival - requests[0].arrival
    rate = f"{len(requests) / span:.3g} a second" if span else "all at once"
    prompt = sum(len(job.prompt_experts) for job in requests) / len(requests)
    output = sum(len(job.output_experts) for job in requests) / len(requests)
    return (
        f"{cfg.layer} layers of {cfg.embed}, {bank.experts} {bank.storage} experts of {bank.channels} channels, "
        f"{bank.pages} pages a layer of {bank.page_bytes / 1e6:.2f} MB\n"
        f"{machine.name}: {machine.flops / 1e12:.0f} TFLOP/s, "
        f"{machine.bandwidth / 1e9:.0f} GB/s, link {machine.link_rate / 1e9:.1f} GB/s "
        f"(assumed {assumed.flops_share:.0%}, {assumed.memory_share:.0%} and {assumed.link_share:.0%} of the peaks)\n"
        f"{len(requests)} requests, {rate}, {prompt:.0f} + {output:.0f} tokens on "
        f"average; room for {case.kv_pages * Simulation.PAGE_TOKENS} tokens of keys and values"
    )


def draw(config: SimulateConfig, cases: dict, results: dict, latencies: dict, run: Simulation | None) -> None:
    """Pictures of the comparison in config.plots."""
    folder, title = config.plots, f"{config.model} on {config.machine}"
    assert folder is not None
    plots.latency_cdf(folder / "latency.png", latencies, title)
    if len(cases) > 1:
        shares = [case.expert_memory / case.bank.total_bytes for case in cases.values()]
        for name, key, scale, label in (
            ("hits", "byte_hit_ratio", 100.0, "bytes read that were on the device, %"),
            ("bytes", "bytes_per_generated_token", 1e-6, "MB moved per generated token"),
        ):
            rows = {way: [scale * results[memory][way][key] for memory in cases] for way in latencies}
            plots.against_memory(folder / f"{name}.png", shares, rows, label, title)
    if run is not None and run.passes and run.link.transfers:
        middle = run.passes[len(run.passes) // 2][0]
        span = (middle, middle + 4 * run.clock / len(run.steps))
        plots.timeline(folder / "timeline.png", run.passes, run.link.transfers, span, title)


if __name__ == "__main__":
    cli.run(main)
