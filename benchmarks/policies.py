"""Scheduling, residency, transfers and storage of experts, each part's share of the gain, on a virtual clock.

    python benchmarks/policies.py --json policies.json
    python benchmarks/policies.py --soak

Llama-2-7B with seven experts on machines that exist as numbers (serving/machines.py); the scheduler, the residency and
the pages are the engine's own. Sections:

- bytes: all requests at once, 32 to 64 live, batches of 8 and 16, separate experts, 25 % of memory: expert bytes moved
  per generated token, fcfs + lru + on-demand over ours (expert-aware + lookahead + prefetch); occupancy and waits;
- latency: the same at 0.8 of the baseline's capacity, burstiness 0.5, from the baseline to ours part by part; then a
  machine whose link is fast enough for transfers to hide;
- storage: tied pages beside separate ones, in the memory of two experts and of one;
- elsewhere: other machines and memories, and the cases that lose: all experts resident, no locality, one request.

`hidden_share` and `bytes_wasted` are the worst of ours in all of them. `--soak`: a million short requests, a day of
the virtual clock; memory must stay flat, and no page, slot or request be left.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from readme_jax.config import RouterConfig
from readme_jax.serving import machines, report, study, traces
from readme_jax.serving.bank import Bank
from readme_jax.serving.machines import Assumed, Costs
from readme_jax.serving.policies import Limits
from readme_jax.serving.simulate import Serving, Simulation
from readme_jax.serving.study import Case
from readme_jax.serving.traces import ArrivalsConfig, RoutedRequest

MODEL, MACHINE, MEMORY = "llama2-7b", "a100-80", "0.25x"
TIED_PAGE = 172  # channels; 4.2 MB of Llama-2-7B, near the best of transfer size and rows read in vain
LENGTHS = ArrivalsConfig(requests=1, rate=1.0, prompt_mean=64, prompt_sigma=0.5, output_mean=64, output_sigma=0.5)
HEADLINE = (16, 48)  # batch_requests, max_live
WORST = {"hidden_share": 1.0, "wasted_bytes": 0}


def requests(count: int, rate: float = 1e9, stay: float = 0.71, burstiness: float = 0.5) -> list[RoutedRequest]:
    """Drawn requests with their experts; at the default rate all come at once."""
    arrivals = dataclasses.replace(LENGTHS, requests=count, rate=rate, burstiness=burstiness)
    return list(traces.route(traces.generate(arrivals), traces.RouterConfig(stay=stay, zipf=0.0)))


def case(memory: str | int = MEMORY, machine: str = MACHINE, storage: study.Storage = "separate") -> Case:
    """The model on a machine, with so much memory for experts."""
    shape = study.named_shape(MODEL, storage=storage, page=TIED_PAGE if storage == "tied" else None)
    return study.make_case(shape, machines.find(machine), memory)


def ours(where: Case, serving: Serving, jobs: Sequence[RoutedRequest]) -> dict:
    """Figures of ours; its hidden share and wasted bytes count."""
    figures = study.run(where, serving, jobs)[0]
    WORST["hidden_share"] = min(WORST["hidden_share"], figures["hidden_share"])
    WORST["wasted_bytes"] = max(WORST["wasted_bytes"], figures["bytes_wasted"])
    return figures


def over(first: dict, second: dict) -> dict:
    """The second run over the first; bytes_ratio the other way round."""
    moved, fewer = first["bytes_per_generated_token"], second["bytes_per_generated_token"]
    return {
        "bytes_ratio": moved / fewer if fewer else None,
        "mean_ratio": second["mean_e2el_ms"] / first["mean_e2el_ms"],
        "p95_ratio": second["p95_e2el_ms"] / first["p95_e2el_ms"],
        "throughput_ratio": second["output_throughput"] / first["output_throughput"],
    }


def bytes_section(count: int) -> dict:
    """Bytes of the baseline over ours, by batch and live requests."""
    out, where, jobs = {}, case(), requests(count)
    print(f"bytes: {MODEL} on {MACHINE}, separate experts, {MEMORY} of memory, {count} requests at once\n")
    print("batch live  bytes ratio   mean    p95  tokens/s  occupancy (fcfs)  experts (fcfs)  wait p99  most  bound")
    for batch, live in itertools.product((8, 16), (32, 48, 64)):
        serving = Serving(limits=Limits(batch_requests=batch, max_live=live))
        base = study.run(where, study.baseline(serving), jobs)[0]
        mine = ours(where, serving, jobs)
        ratios = over(base, mine)
        out[f"{batch},{live}"] = ratios | {k: mine[k] for k in ("occupancy", "p99_wait", "max_wait", "wait_bound")}
        print(
            f"{batch:5} {live:4} {ratios['bytes_ratio']:12.2f} {ratios['mean_ratio']:6.3f} {ratios['p95_ratio']:6.3f} "
            f"{ratios['throughput_ratio']:9.2f} {mine['occupancy']:10.2f} {base['occupancy']:6.2f} "
            f"{mine['unique_experts']:9.2f} {base['unique_experts']:6.2f} {mine['p99_wait']:10} {mine['max_wait']:5} "
            f"{mine['wait_bound']:6.0f}"
        )
    return out


def latency_section(count: int, machine: str = MACHINE, memory: str = MEMORY) -> dict:
    """From the baseline to ours at 0.8 of the baseline's capacity, and tied pages in the same memory."""
    where, serving, jobs = case(memory, machine), Serving(), requests(count)
    rate = 0.8 * study.capacity(where, study.baseline(serving), jobs)
    jobs = requests(count, rate)
    results = {}
    for name, way in study.ablation(serving).items():
        results[name] = ours(where, way, jobs) if way == serving else study.run(where, way, jobs)[0]
    last = list(results)[-1]
    results["+ tied pages"] = ours(case(where.expert_memory, machine, "tied"), serving, jobs)
    print(f"\nlatency on {machine}, {memory} of memory: {count} requests, {rate:.3f} a second, burstiness 0.5\n")
    print(report.table(results))
    base = results[next(iter(results))]
    steps = {name: over(base, figures) for name, figures in results.items()}
    print("\nover the baseline")
    for name, ratios in steps.items():
        print(f"  {name:<28} mean {ratios['mean_ratio']:.3f}  p95 {ratios['p95_ratio']:.3f}")
    return {"rate": rate, "steps": steps, "ours": steps[last]}


def storage_section(count: int) -> dict:
    """Tied beside separate pages in the memory of two experts and of one."""
    jobs, serving, out = requests(count), Serving(), {}
    expert = case().bank.total_bytes // traces.RouterConfig().experts
    print(f"\nstorage: {count} requests at once, hits by byte once every page has been loaded that fits\n")
    for experts in (2, 1):
        for storage in ("separate", "tied"):
            where = case(experts * expert, storage=storage)
            simulation = study.run(where, serving, jobs)[1]
            warm = len(simulation.steps) // 4
            later = report.step_figures(simulation.steps[warm:])
            moved = later["bytes_moved"] / sum(s.decode + s.prefill for s in simulation.steps[warm:])
            out[f"{storage}, {experts}"] = {"hit_ratio": later["byte_hit_ratio"], "bytes_per_token": moved}
            hits = f"hits {later['byte_hit_ratio']:7.2%}"
            print(f"{experts} experts' memory, {storage:<9} {hits}  {moved / 1e6:9.2f} MB a token")
    return out


def elsewhere_section(count: int) -> dict:
    """Other machines, memories and traces; ours over the baseline, all requests at once unless said otherwise."""
    cases = {
        "h100, half of memory": (case("0.5x", "h100"), requests(count), Serving()),
        "gh200, quarter of memory": (case("0.25x", "gh200"), requests(count), Serving()),
        "gh200, three quarters": (case("0.75x", "gh200"), requests(count), Serving()),
        "v5p, half of memory": (case("0.5x", "v5p"), requests(count), Serving()),
        "all experts resident": (case("1.0x"), requests(count), Serving()),
        "all resident, tied": (case("1.0x", storage="tied"), requests(count), Serving()),
        "no locality": (case(), requests(count, stay=1 / 7), Serving()),
        "one live request": (case(), requests(count // 10), Serving(limits=Limits(max_live=1))),
        "few live (4)": (case(), requests(count // 4), Serving(limits=Limits(max_live=4))),
    }
    out = {}
    print(f"\nelsewhere: ours over the baseline, {count} requests at once\n")
    print(f"{'':<26} bytes ratio   mean    p95  tokens/s   hidden %  stall %")
    for name, (where, jobs, serving) in cases.items():
        base, mine = study.run(where, study.baseline(serving), jobs)[0], ours(where, serving, jobs)
        out[name] = ratios = over(base, mine)
        fewer = f"{ratios['bytes_ratio']:12.2f}" if ratios["bytes_ratio"] else f"{'-':>12}"
        print(
            f"{name:<26}{fewer} {ratios['mean_ratio']:6.3f} {ratios['p95_ratio']:6.3f} "
            f"{ratios['throughput_ratio']:9.2f} {100 * mine['hidden_share']:10.1f} {100 * mine['stall_share']:8.1f}"
        )
    return out


# ---- soak -----------------------------------------------------------------------------------------


def endless(count: int, block: int = 10_000) -> Iterator[RoutedRequest]:
    """Short requests, made as they are asked for."""
    begin = 0.0
    for seed in range(-(-count // block)):
        arrivals = ArrivalsConfig(
            requests=min(block, count - seed * block), rate=1e6 / 86_400, burstiness=0.5, prompt_mean=6,
            prompt_sigma=0.5, output_mean=4, output_sigma=0.5, seed=seed,
        )  # fmt: skip
        last = begin
        for job in traces.route(traces.generate(arrivals), traces.RouterConfig(experts=4, seed=seed)):
            last = begin + job.arrival
            yield dataclasses.replace(job, arrival=last)
        begin = last


def soak(count: int) -> dict:
    """A million requests; SystemExit when something is left or memory grows."""
    cfg = machines.MODELS["smollm2-135m"]
    bank = Bank.synthetic(layers=2, experts=4, channels=cfg.mlp // 2, row_bytes=3 * cfg.embed * 2, page=cfg.mlp // 4)
    slow = machines.find("v5e", Assumed(step_overhead=0.3))  # a million requests fill a day
    costs = Costs(slow, dataclasses.replace(cfg, layer=2), cfg.mlp // 2, RouterConfig(), 4, bank.page)
    served, steps = collections.deque(maxlen=1000), collections.deque(maxlen=1000)
    serving = Serving(limits=Limits(batch_requests=32, max_live=128))
    simulation = Simulation(
        costs, bank, serving, expert_memory=bank.total_bytes // 2, kv_pages=512, requests=served, steps=steps
    )
    peaks, began = [], time.perf_counter()

    def watched():
        for i, job in enumerate(endless(count)):
            if i % (count // 10) == 0:
                peaks.append(_memory_mb())
                hours, seconds = simulation.clock / 3600, time.perf_counter() - began
                print(f"{i:9,} requests, {hours:.1f} h, {peaks[-1]:.0f} MB, {seconds:.0f} s", flush=True)
            yield job

    simulation.run(watched())
    residency, pool = simulation.residency, simulation.pool
    held = np.flatnonzero(residency.slot_of >= 0)
    problems = {
        "requests left": simulation.scheduler.unfinished + simulation.pending,
        "KV pages lost": pool.pages - pool.available,
        "slots lost": int((residency.item_of[residency.slot_of[held]] != held).sum()),
        "bytes moved beside the plan": simulation.link.moved - residency.counters.bytes_loaded,
    }
    grown = peaks[-1] - peaks[len(peaks) // 3]
    figures = {
        "requests": count,
        "steps": residency.counters.steps,
        "hours": simulation.clock / 3600,
        "seconds": time.perf_counter() - began,
        "grown_mb": grown,
        **problems,
    }
    print(json.dumps(figures, indent=1))
    if any(problems.values()) or grown > 16:
        raise SystemExit("the soak failed")
    return figures


def _memory_mb() -> float:
    """Resident set now, in MiB; its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--requests", type=int, default=300, help="requests of a run")
    parser.add_argument("--soak", action="store_true", help="only the soak: a million requests")
    parser.add_argument("--soak-requests", type=int, default=1_000_000, help="requests of the soak")
    args = parser.parse_args()
    if args.soak:
        figures = {"soak": soak(args.soak_requests)}
    else:
        sections = {"bytes": bytes_section(args.requests), "latency": latency_section(args.requests)}
        sections["latency, gh200"] = latency_section(args.requests, "gh200", "0.5x")
        sections |= {"storage": storage_section(args.requests), "elsewhere": elsewhere_section(args.requests)}
        batch, live = HEADLINE
        figures = {
            "bytes_ratio": sections["bytes"][f"{batch},{live}"]["bytes_ratio"],
            "bytes_ratio_worst": min(cell["bytes_ratio"] for cell in sections["bytes"].values()),
            "mean_ratio": sections["latency"]["ours"]["mean_ratio"],
            "p95_ratio": sections["latency"]["ours"]["p95_ratio"],
            **WORST,
            "tied_hit_ratio_two_experts": sections["storage"]["tied, 2"]["hit_ratio"],
        }
        print("\n" + json.dumps(figures, indent=1))
        figures |= sections
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
