"""The serving figures of the paper (arXiv 2410.19123, section 5), and ours of the same setting beside them.

The paper's trace and engine are not public: what it says is the number of experts, the cache's capacities and what came
out. Batch size and locality are chosen so that its decode-first batches have as many experts as it reports.
"""

import dataclasses
from collections.abc import Sequence

from readme_jax.serving import study
from readme_jax.serving.bank import Bank
from readme_jax.serving.policies import Policy as Schedule
from readme_jax.serving.residency import Policy, Residency
from readme_jax.serving.simulate import Serving
from readme_jax.serving.study import Case
from readme_jax.serving.traces import RoutedRequest

EXPERTS, CAPACITIES = 7, (2, 3, 4, 5)
# Table 4: hit ratio in percent by capacity, in whole experts. Belady is on queued requests, as our lookahead.
HITS: dict[Policy, tuple[float, ...]] = {
    "random": (34.2, 50.1, 67.5, 82.9),
    "lru": (33.9, 52.4, 67.0, 83.5),
    "lookahead": (44.2, 61.8, 77.2, 88.0),
}
UNIQUE: dict[Schedule, float] = {"decode-first": 5.08, "prefill-first": 5.21, "longest-queue": 3.51}  # of a batch
# Latency of Read-ME less that of the other schedule, in percent of it
LATENCY: dict[Schedule, dict[str, float]] = {
    "decode-first": {"mean": -6.1, "p95": -10.0},
    "prefill-first": {"mean": -5.0, "p95": -9.5},
}


def column_hits(steps: Sequence[frozenset[int]], capacity: int, policy: Policy, lookahead: int) -> float:
    """Percent of accesses that hit a cache of `capacity` whole experts, as the paper counts: each batch asks for each
    of its experts once. lookahead: batches that the policy of that name sees ahead."""
    bank = Bank.synthetic(layers=1, experts=EXPERTS, channels=1, row_bytes=1, page=1)
    cache = Residency(bank, capacity, policy=policy)
    for i, wanted in enumerate(steps):
        cache.plan(wanted, steps[i + 1 : i + 1 + lookahead])
    return 100 * cache.counters.hit_ratio


def figures(case: Case, serving: Serving, jobs: Sequence[RoutedRequest]) -> dict:
    """Ours: hits by policy and capacity on the order of the longest-queue schedule, experts of a batch and latencies by
    schedule, all experts resident, since the paper's change of latency is that of its batches."""
    whole = dataclasses.replace(case, expert_memory=case.bank.total_bytes)
    unique, latency, order = {}, {}, []
    for schedule in UNIQUE:
        way = dataclasses.replace(serving, schedule=schedule)
        out, simulation = study.run(whole, way, jobs, order=True)
        unique[schedule] = out["unique_experts"]
        latency[schedule] = {"mean": out["mean_e2el_ms"], "p95": out["p95_e2el_ms"]}
        order = simulation.order or []
    hits = {p: [column_hits(order, c, p, serving.lookahead) for c in CAPACITIES] for p in HITS}
    ours = latency["longest-queue"]
    change = {s: {k: 100 * (ours[k] / latency[s][k] - 1) for k in ours} for s in LATENCY}
    return {"accesses": sum(map(len, order)), "hit_percent": hits, "unique_experts": unique, "latency_percent": change}


def table(ours: dict) -> str:
    """Ours and the paper's side by side."""
    lines = [f"hit ratio %, capacity in experts of {EXPERTS}; {ours['accesses']} accesses (paper: about 351)"]
    lines.append(f"{'':<12}" + "".join(f"{f'{c}: ours':>10} {'paper':>6}" for c in CAPACITIES))
    for policy, theirs in HITS.items():
        cells = [f"{a:10.1f} {b:6.1f}" for a, b in zip(ours["hit_percent"][policy], theirs)]
        lines.append(f"{policy:<12}" + "".join(cells))
    lines.append("\nexperts of a batch        ours  paper")
    lines += [f"{s:<20} {ours['unique_experts'][s]:9.2f} {theirs:6.2f}" for s, theirs in UNIQUE.items()]
    lines.append("\nlatency of longest-queue, change in %    mean: ours  paper   p95: ours  paper")
    for schedule, theirs in LATENCY.items():
        got = ours["latency_percent"][schedule]
        cells = f"{got['mean']:12.1f} {theirs['mean']:6.1f} {got['p95']:11.1f} {theirs['p95']:6.1f}"
        lines.append(f"against {schedule:<31}{cells}")
    return "\n".join(lines)
