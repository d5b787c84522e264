"""Figures of a served trace, from plain records of requests and steps: the engine's and the simulator's alike.

Key names are those of the JSON that `vllm bench serve` writes, where it has the figure.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from readme_jax.config import require

PERCENTILES = (50, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """One request that has ended. Times in seconds of one clock; tokens: when each token of the output was there.

    passed_over: batches that were formed while the request could have run and did not, over its whole life (the bound
    of `max_wait` is on those between two turns). preempted: times its pages were dropped.
    """

    arrival: float
    tokens: Sequence[float]
    prompt: int
    cancelled: bool = False
    passed_over: int = 0
    preempted: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One batch on the device. Times in seconds of the clock of the requests.

    start: as its first layer might have begun. end: as its results were there. stall: waiting for the link, within.
    requests, prefill, decode: of the batch, the two in tokens. live: requests that had arrived and not ended. experts:
    different ones in the batch. waves: 1, or into how many parts the FFN of the worst layer was split.
    pages: expert pages read, all layers. missing: those of them that had to be loaded. hit_tokens: tokens, once a
    layer, whose expert's pages were all there. page_bytes: of one page; moved: bytes loaded for this step, wasted:
    bytes that an earlier step loaded and that were overwritten before a layer read them.
    """

    start: float
    end: float
    stall: float
    requests: int
    prefill: int
    decode: int
    live: int
    experts: int
    pages: int
    missing: int
    hit_tokens: float
    layers: int
    page_bytes: int
    moved: int
    wasted: int = 0
    waves: int = 1
    route: float = 0.0


def latencies(requests: Iterable[Served]) -> dict[str, np.ndarray]:
    """Milliseconds: ttft, e2el of each finished request; tpot of each with two tokens or more; itl of each gap."""
    done = [r for r in requests if r.tokens and not r.cancelled]
    more = [r for r in done if len(r.tokens) > 1]
    return {
        "ttft": 1e3 * np.array([r.tokens[0] - r.arrival for r in done]),
        "tpot": 1e3 * np.array([(r.tokens[-1] - r.tokens[0]) / (len(r.tokens) - 1) for r in more]),
        "itl": 1e3 * np.concatenate([np.diff(r.tokens) for r in more] or [np.zeros(0)]),
        "e2el": 1e3 * np.array([r.tokens[-1] - r.arrival for r in done]),
    }


def summary(values: np.ndarray, name: str) -> dict[str, float]:
    """`mean_<name>_ms`, median, std and percentiles of milliseconds; zeros of nothing, as in vLLM."""
    values = values if len(values) else np.zeros(1)
    out = {f"mean_{name}_ms": float(values.mean()), f"median_{name}_ms": float(np.median(values))}
    out[f"std_{name}_ms"] = float(values.std())
    return out | {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}


def request_figures(requests: Sequence[Served], duration: float, goal: dict[str, float] | None = None) -> dict:
    """Counts, throughput and latencies of requests over `duration` seconds.

    goal: upper limits in ms by latency (ttft, tpot, e2el), as `--goodput` of vLLM: `request_goodput` counts requests a
    second that keep all of them. reorder: mean and largest number of later arrivals with an earlier first token.
    """
    require(duration > 0, f"duration={duration} must be positive")
    unknown = set(goal or {}) - {"ttft", "tpot", "e2el"}
    require(not unknown, f"goodput: {', '.join(sorted(unknown))} is not one of ttft, tpot, e2el")
    done = [r for r in requests if r.tokens and not r.cancelled]
    inputs, outputs = sum(r.prompt for r in done), sum(len(r.tokens) for r in done)
    figures = {
        "duration": duration,
        "completed": len(done),
        "cancelled": sum(r.cancelled for r in requests),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    if goal:
        figures["request_goodput"] = sum(_keeps(r, goal) for r in done) / duration
    for name, values in latencies(requests).items():
        figures |= summary(values, name)
    overtaken, delays = overtakings(done)
    figures |= summary(1e3 * delays, "reorder")
    figures |= {
        "mean_reorder": float(overtaken.mean()) if len(done) else 0.0,
        "max_reorder": int(overtaken.max()) if len(done) else 0,
        "max_passed_over": max((r.passed_over for r in done), default=0),
        "p99_passed_over": float(np.percentile([r.passed_over for r in done], 99)) if done else 0.0,
        "preemptions": sum(r.preempted for r in requests),
    }
    return figures


def _keeps(r: Served, goal: dict[str, float]) -> bool:
    span = r.tokens[-1] - r.tokens[0]
    got = {
        "ttft": r.tokens[0] - r.arrival,
        "tpot": span / (len(r.tokens) - 1) if len(r.tokens) > 1 else 0.0,
        "e2el": r.tokens[-1] - r.arrival,
    }
    return all(1e3 * got[name] <= limit for name, limit in goal.items())


def overtakings(requests: Sequence[Served]) -> tuple[np.ndarray, np.ndarray]:
    """For each request, in order of arrival: int64 [N], how many that arrived later had their first token earlier, and
    float64 [N], the seconds from the earliest of those tokens to its own (0 if there was none)."""
    first = np.array([r.tokens[0] for r in sorted(requests, key=lambda r: r.arrival)])
    seen, counts = [], np.zeros(len(first), np.int64)
    for i in range(len(first) - 1, -1, -1):
        counts[i] = bisect.bisect_left(seen, first[i])
        bisect.insort(seen, first[i])
    earliest = np.minimum.accumulate(first[::-1])[::-1]
    return counts, first - earliest


def step_figures(steps: Sequence[Step]) -> dict:
    """Batches, hits and bytes of a run's steps. Ratios are of sums, not means of ratios.

    hit_ratio by page: pages read that were there when the batch was committed. token_hit_ratio: tokens and layers whose
    expert was there whole. byte_hit_ratio: by bytes of pages as wide as they are, the same as by page while pages are
    equal.
    """
    if not steps:
        return {"steps": 0}
    total = {f.name: np.array([getattr(s, f.name) for s in steps]) for f in dataclasses.fields(Step)}
    tokens = total["prefill"] + total["decode"]
    read = float((total["pages"] * total["page_bytes"]).sum())
    span = float(total["end"][-1] - total["start"][0])
    running = float((total["end"] - total["start"]).sum())
    return {
        "steps": len(steps),
        "mean_batch_requests": float(total["requests"].mean()),
        "mean_batch_tokens": float(tokens.mean()),
        "mean_live": float(total["live"].mean()),
        "unique_experts": float(total["experts"].mean()),
        "unique_experts_decode": float(total["experts"][total["prefill"] == 0].mean())
        if (total["prefill"] == 0).any()
        else 0.0,
        "pages_per_layer": float(total["pages"].sum() / total["layers"].sum()),
        "hit_ratio": 1 - _ratio(total["missing"].sum(), total["pages"].sum()),
        "token_hit_ratio": _ratio(total["hit_tokens"].sum(), (tokens * total["layers"]).sum(), 1.0),
        "byte_hit_ratio": 1 - _ratio((total["missing"] * total["page_bytes"]).sum(), read),
        "pages_loaded": int(total["missing"].sum()),
        "bytes_moved": int(total["moved"].sum()),
        "bytes_wasted": int(total["wasted"].sum()),
        "bytes_read": int(read),
        "stall_s": float(total["stall"].sum()),
        "stall_share": _ratio(total["stall"].sum(), running),
        "busy_share": _ratio(running, span, 1.0),
        "router_share": _ratio(total["route"].sum(), running),
        "max_waves": int(total["waves"].max()),
    }


def _ratio(part: float, whole: float, of_nothing: float = 0.0) -> float:
    return float(part / whole) if whole else of_nothing


def figures(
    requests: Sequence[Served],
    steps: Sequence[Step],
    duration: float,
    *,
    goal: dict[str, float] | None = None,
    least_loads: int | None = None,
) -> dict:
    """All figures of a run. least_loads: page loads of the offline optimum on the executed order, where computed. Bytes
    a generated token: of all steps, over the output of the requests that were not cancelled."""
    out = request_figures(requests, duration, goal) | step_figures(steps)
    if steps:
        out["bytes_per_generated_token"] = _ratio(out["bytes_moved"], out["total_output_tokens"])
        out["bytes_read_per_generated_token"] = _ratio(out["bytes_read"], out["total_output_tokens"])
    if least_loads is not None:
        out["least_loads"] = least_loads
        out["loads_over_min"] = _ratio(out.get("pages_loaded", 0), least_loads, 1.0)
    return out


# ---- for a person ---------------------------------------------------------------------------------

COLUMNS = (  # heading, key, scale, digits
    ("TTFT ms", "mean_ttft_ms", 1, 0), ("p99", "p99_ttft_ms", 1, 0), ("TPOT ms", "mean_tpot_ms", 1, 1),
    ("e2e ms", "mean_e2el_ms", 1, 0), ("p50", "p50_e2el_ms", 1, 0), ("p95", "p95_e2el_ms", 1, 0),
    ("p99", "p99_e2el_ms", 1, 0), ("tok/s", "output_throughput", 1, 1), ("hit %", "token_hit_ratio", 100, 1),
    ("byte %", "byte_hit_ratio", 100, 1), ("MB/tok", "bytes_per_generated_token", 1e-6, 2),
    ("stall %", "stall_share", 100, 1), ("experts", "unique_experts", 1, 2), ("reorder", "mean_reorder", 1, 2),
)  # fmt: skip


def table(results: dict[str, dict]) -> str:
    """One line a run, by name; `results` are what `figures` returns. Figures that a run lacks are left blank."""
    names = max(map(len, results), default=0)
    keys = COLUMNS
    if any("loads_over_min" in r for r in results.values()):
        keys = (*COLUMNS, ("/MIN", "loads_over_min", 1, 3))
    widths = {key: max(len(head), 8) for head, key, _, _ in keys}
    lines = [" " * names + "".join(f" {head:>{widths[key]}}" for head, key, _, _ in keys)]
    for name, result in results.items():
        cells = [
            f" {result[key] * scale:>{widths[key]}.{digits}f}" if key in result else " " * (widths[key] + 1)
            for _, key, scale, digits in keys
        ]
        lines.append(f"{name:<{names}}" + "".join(cells))
    return "\n".join(lines)
