"""A trace of requests replayed through the engine, for one or every pair of scheduling and residency policy.

readme-jax bench runs/tuned --trace azure.csv --expert-memory 0.5x --policies all --out runs/bench

In: a tuned model, a trace (Azure CSV, BurstGPT CSV, ShareGPT JSON, our JSONL; none: generated) and, for traces without
prompts, the `data` folder whose held-out text they take. Out: a table; with `--out` bench.json (keys of `vllm bench
serve`), plots and routing.jsonl, which `readme-jax simulate` reads. Requests arrive in real time.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from readme_jax import api, artifacts, cli
from readme_jax.config import DataError, require, to_dict
from readme_jax.data import open_records
from readme_jax.metrics import progress
from readme_jax.serving import plots, replay, report
from readme_jax.serving.engine import Engine
from readme_jax.serving.options import RESIDENCIES, SCHEDULES, EngineOptions
from readme_jax.serving.recorder import Recorder
from readme_jax.serving.trace_files import read_trace
from readme_jax.serving.traces import ArrivalsConfig, TraceRequest, arriving, at_rate, clip, generate, with_prompts

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # of all expert pages, in the plots against memory
DRAWN = ArrivalsConfig(requests=64, rate=2.0, prompt_mean=128, output_mean=48)
SHOWN_S = 0.5  # seconds of the timeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(EngineOptions):
    """One benchmark: a model, a trace, policies, and every option of the engine."""

    model: str
    """Tuned model: folder or hub name. As the first argument it needs no `--model`."""
    policies: tuple[str, ...] = ()
    """Pairs such as expert-aware+lookahead, or `all`; none: the pair of `schedule` and `residency`."""
    trace: Path | None = None
    """Trace file; none: `arrivals` says what comes."""
    requests: int = 64
    """First requests of the trace file to replay; 0: all."""
    rate: float = 0.0
    """Requests per second that the trace file is brought to; 0: its own times."""
    arrivals: ArrivalsConfig = DRAWN
    """The generated trace, where there is no file."""
    data: Path | None = None
    """Folder of `readme-jax data` whose held-out text gives the prompts; none: the one the model was tuned on."""
    goal_ttft: float = 0.0
    """Milliseconds to the first token that count as good; 0: no such goal. Requests that keep all goals are goodput."""
    goal_tpot: float = 0.0
    """The same for the time per further token."""
    goal_e2el: float = 0.0
    """The same for the whole request."""
    seed: int = 0
    """Which text the prompts take."""
    out: Path | None = None
    """Folder for figures, plots and the routing trace."""

    def __post_init__(self):
        super().__post_init__()
        known = [f"{schedule}+{residency}" for schedule in SCHEDULES for residency in RESIDENCIES]
        for name in self.policies:
            require(name in ("all", *known), f"policies: {name!r} is not `all` or one of {', '.join(known)}")
        one = (self.schedule, self.residency) == (EngineOptions.schedule, EngineOptions.residency)
        require(
            one or not self.policies, "policies names the pairs; schedule and residency are for one pair without it"
        )
        drawn = self.requests == 64 and self.rate == 0
        require(
            self.trace is not None or drawn, "requests and rate are of a trace file; see arrivals for drawn requests"
        )
        require(self.trace is None or self.arrivals == DRAWN, "arrivals draws requests; the trace file has its own")
        require(self.requests >= 0, f"requests={self.requests} must be 0 (all) or more")
        require(self.rate >= 0, f"rate={self.rate} must be 0 (as in the trace) or more")
        for name in ("goal_ttft", "goal_tpot", "goal_e2el"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be 0 (none) or more")

    def pairs(self) -> list[str]:
        """Names of the pairs to run."""
        every = [f"{schedule}+{residency}" for schedule in SCHEDULES for residency in RESIDENCIES]
        return every if "all" in self.policies else list(self.policies) or [f"{self.schedule}+{self.residency}"]

    def goals(self) -> dict[str, float] | None:
        """Goals in ms by name, None without any."""
        goals = {name: getattr(self, f"goal_{name}") for name in ("ttft", "tpot", "e2el")}
        return {name: goal for name, goal in goals.items() if goal} or None


def read_requests(config: BenchConfig, model: api.Model) -> list[TraceRequest]:
    """The requests to replay, with their prompts."""
    trace = generate(config.arrivals)
    if config.trace is not None:
        trace = read_trace(config.trace, model.encode, vocab=model.config.vocab)[: config.requests or None]
        if config.rate:
            together = trace[-1].arrival == trace[0].arrival
            trace = arriving(trace, config.rate) if together else at_rate(trace, config.rate)
    trace = clip(trace, config.context or model.config.max_position)
    if all(one.prompt is not None for one in trace):
        require(config.data is None, f"data={config.data}: the trace has prompts of its own")
        return trace
    folder = config.data or replay.data_folder(model.folder)
    rule = f"the trace has no prompts and {model.folder} does not say what it was tuned on; --data names held-out text"
    require(folder is not None, rule, DataError)
    assert folder is not None
    return with_prompts(trace, open_records(folder, "test", model.config.vocab), config.seed)


def run_pair(
    config: BenchConfig, engine: Engine, trace: list[TraceRequest], pair: str
) -> tuple[dict[str, Any], Recorder]:
    """Replay the trace under one pair of policies: figures, and what was recorded."""
    schedule, residency = pair.split("+")
    recorder, tokens = Recorder(), sum(one.output_tokens for one in trace)
    engine.restart(schedule=schedule, residency=residency, recorder=recorder)
    with progress(tokens, pair) as bar:
        duration = replay.replay(engine, trace, bar)
    return replay.figures(engine, recorder, duration, config.goals()), recorder


def main(argv: list[str] | None = None) -> None:
    """Replay under every pair that is asked for, print the table, write the results."""
    config: BenchConfig = cli.parse(BenchConfig, argv, __doc__ or "", prog="readme-jax bench", first="model")
    model = api.load(config.model, weights=False)
    trace = read_requests(config, model)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the replay
    inputs, outputs = sum(len(one.prompt or ()) for one in trace), sum(one.output_tokens for one in trace)
    results: dict[str, dict[str, Any]] = {}
    latencies, curves, last = {}, {}, None
    options: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(EngineOptions)}
    with Engine(model, progress=True, **options) as engine:
        replay.check(engine, trace)
        bank = engine.parts.bank
        for pair in config.pairs():
            results[pair], recorder = run_pair(config, engine, trace, pair)
            latencies[pair] = report.latencies(recorder.served)["e2el"] / 1e3
            if pair.split("+")[0] not in curves and config.out is not None:
                budgets = [round(share * bank.total_bytes) for share in SHARES]
                curves[pair.split("+")[0]] = replay.memory_curve(recorder, bank, budgets, config.mode)
            last = last or (pair, recorder, bank.experts)
    print(f"{len(trace)} requests over {trace[-1].arrival:.1f} s, {inputs} prompt and {outputs} output tokens")
    print(report.table(results))
    if config.out is not None and last is not None:
        write(config, results, latencies, curves, outputs, last)
        print(f"results: {config.out}", file=sys.stderr)


def write(config: BenchConfig, results, latencies, curves, outputs: int, last: tuple[str, Recorder, int]) -> None:
    """bench.json, plots and routing.jsonl."""
    out = config.out
    assert out is not None
    text = {"config": to_dict(config), "results": results, "memory_curves": curves}
    artifacts.write_text(out / "bench.json", json.dumps(text, indent=1) + "\n")
    name, recorder, experts = last
    recorder.write_routing(out / "routing.jsonl", experts)
    plots.latency_cdf(out / "latency_cdf.png", latencies, "requests answered in time")
    for schedule, curve in curves.items():
        shares = list(SHARES[-min(map(len, curve.values())) :])
        hits: dict[str, Any] = {policy: [point["token_hit_ratio"] for point in row] for policy, row in curve.items()}
        moved: dict[str, Any] = {
            policy: [point["bytes_loaded"] / outputs / 1e6 for point in row] for policy, row in curve.items()
        }
        title = f"batches of {schedule}"
        plots.against_memory(out / f"hits_{schedule}.png", shares, hits, "token hit ratio", title)
        plots.against_memory(out / f"bytes_{schedule}.png", shares, moved, "MB loaded / generated token", title)
    middle = recorder.steps[len(recorder.steps) // 2].start
    passes = [(step.start, step.end) for step in recorder.steps]
    sent: Any = recorder.sent  # as the simulator's transfers, they begin and end
    plots.timeline(out / "timeline.png", passes, sent, (middle, middle + SHOWN_S), name)


if __name__ == "__main__":
    cli.run(main)
