"""Loads of expert pages by each residency policy beside the fewest possible (Belady's MIN) of the same executed order.

    python benchmarks/residency.py --json residency.json
    python benchmarks/residency.py --model CARVED --data DATA     # and the routing of a real router on real text

A step takes one token of each of 1, 4 or 8 requests. Expert of a token: that of the request's token before it with
probability 0.5, 0.7 or 0.9, else any (the paper's 2921 of 4096 is 0.71). 7, 8 and 16 experts, memory for 12.5, 25 and
50 % of them. `separate`: 32 layers, a page is one expert's channels of a layer. `tied`: 8 layers, pages of 16 rows of
an FFN of SmolLM2's width, whose experts share 69 % of their channels. `routed`, `routed/t`: a model's own routing, with
both storages. Lookahead sees the next 256 tokens. Policies run layer by layer (`--mode layer`: a page may go as soon as
its layer is past, and no pool need hold a whole expert) or with whole columns, as in the paper.

Of the two shares `fewer_than_*_25`, over all traces at 25 % memory, the mean is the figure; `*_worst` is the worst
trace. Where not even MIN loads that much less than lru, no policy can: the column `best` says so (MIN against lru), and
`fewer_than_lru_25_possible` is the mean of MIN itself.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from readme_jax.serving.bank import Bank, Mode
from readme_jax.serving.optimum import fewest_loads
from readme_jax.serving.residency import MODES, Policy, Residency

VISIBLE = 256  # tokens that lookahead sees
STAYS, TOKENS, EXPERTS, BUDGETS = (0.5, 0.7, 0.9), (1, 4, 8), (7, 8, 16), (0.125, 0.25, 0.5)
Trace = list[frozenset[int]]


def chain(tokens: int, experts: int, stay: float, batch: int, seed: int) -> Trace:
    """Expert sets of `tokens` / `batch` steps of `batch` independent requests."""
    rng = np.random.default_rng([seed, experts, batch, round(100 * stay)])
    steps = tokens // batch
    keep_SB, new_SB = rng.random((steps, batch)) < stay, rng.integers(experts, size=(steps, batch))
    now_B, found = rng.integers(experts, size=batch), []
    for keep_B, new_B in zip(keep_SB, new_SB):
        now_B = np.where(keep_B, now_B, new_B)
        found.append(frozenset(now_B.tolist()))
    return found


def routed(model: Path, data: Path, tokens: int) -> tuple[list[np.ndarray], Bank, float]:
    """Experts of each token of records of every domain in turn, by the model's router; the pages of its experts; and
    the share of tokens that keep the expert of the token before."""
    from readme_jax import api, hf

    loaded = api.load(model)
    files = sorted(data.glob("*.test.ids.npy")) + sorted(data.glob("*.train.ids.npy"))
    records = [np.load(path, mmap_mode="r") for path in files]
    rows = [array[i] for i in range(max(map(len, records))) for array in records if i < len(array)]
    rows = rows[: -(-tokens // len(rows[0]))]
    ids_BT = loaded.route(np.stack(rows).astype(np.int32))
    assert ids_BT is not None, f"{model} has no router"
    cfg, experts, _ = hf.read_config(model)
    table_LEC = hf.load_params(model)[1]
    assert experts is not None and table_LEC is not None
    bank = Bank.from_table(table_LEC, cfg.mlp, row_bytes=6 * cfg.embed, separate=experts.storage == "separate")
    return list(ids_BT), bank, float((ids_BT[:, 1:] == ids_BT[:, :-1]).mean())


def served(requests: list[np.ndarray], batch: int) -> Trace:
    """One token a step of each of `batch` requests; the next request begins where one ends."""
    lanes = [np.concatenate(requests[i::batch]) for i in range(batch)]
    return [frozenset(step.tolist()) for step in np.stack([lane[: min(map(len, lanes))] for lane in lanes], 1)]


def loads(bank: Bank, budget: int, policy: Policy, mode: Mode, trace: Trace, batch: int) -> tuple[int, int, float]:
    """(loads, MIN, microseconds of processor time a step) of one policy on one trace; MIN of lookahead's order only."""
    ours = policy == "lookahead"
    residency, ahead = Residency(bank, budget, policy=policy, mode=mode, record=ours), VISIBLE // batch
    futures = [trace[t + 1 : t + 1 + ahead] for t in range(len(trace))] if ours else [()] * len(trace)
    start = time.process_time()
    for experts, future in zip(trace, futures):
        residency.plan(experts, future)
    spent = (time.process_time() - start) / len(trace) * 1e6
    return residency.counters.loads, fewest_loads(residency.accesses or (), residency.slots), spent


def compare(name: str, bank: Bank, trace: Trace, batch: int, stay: float, mode: Mode) -> list[dict]:
    """One row for each memory share that holds what the mode needs at least."""
    rows = []
    for share in BUDGETS:
        budget = int(share * bank.total_bytes)
        if budget < bank.least(mode) * bank.page_bytes:
            continue
        count, fewest, spent = loads(bank, budget, "lookahead", mode, trace, batch)
        others = {p: loads(bank, budget, p, mode, trace, batch)[0] for p in ("lru", "lfu", "random")}
        row = {
            "trace": name, "experts": bank.experts, "tokens": batch, "stay": stay, "memory": share, "min": fewest,
            "over_min": count / fewest, **{f"fewer_than_{p}": 1 - count / n for p, n in others.items()},
            "best": 1 - fewest / others["lru"], "us": spent,
        }  # fmt: skip
        print(line(row), flush=True)
        rows.append(row)
    return rows


def line(row: dict) -> str:
    return (
        f"{row['trace']:9} {row['experts']:7} {row['tokens']:6} {row['stay']:5.2f} {row['memory']:7.1%} {row['min']:8} "
        f"{row['over_min']:9.4f} {row['fewer_than_lru']:7.1%} {row['best']:7.1%} {row['fewer_than_lfu']:7.1%} "
        f"{row['fewer_than_random']:7.1%} {row['us']:7.0f}"
    )


def summary(rows: list[dict]) -> dict[str, float]:
    """The figures over all rows."""
    quarter = [row for row in rows if row["memory"] == 0.25]
    figures = {
        "loads_over_min_max": max(row["over_min"] for row in rows),
        "loads_over_lru_max": max(1 - row["fewer_than_lru"] for row in rows),
        "fewer_than_lru_25_possible": statistics.mean(row["best"] for row in quarter),
    }
    for policy in ("lru", "lfu", "random"):
        found = [row[f"fewer_than_{policy}"] for row in quarter]
        figures[f"fewer_than_{policy}_25"] = statistics.mean(found)
        figures[f"fewer_than_{policy}_25_worst"] = min(found)
    return figures


def measure(tokens: int, mode: Mode, model: Path | None, data: Path | None) -> dict:
    """All rows and their summary."""
    print(
        f"{'trace':9} experts tokens  stay  memory      MIN  ours/MIN   < lru    best   < lfu  < rand us/step",
        flush=True,
    )
    rows = []
    for experts in EXPERTS:
        bank = Bank.synthetic(layers=32, experts=experts, channels=5504, row_bytes=3 * 4096 * 2)
        for batch in TOKENS:
            for stay in STAYS:
                trace = chain(tokens, experts, stay, batch, 0)
                rows += compare("separate", bank, trace, batch, stay, mode)
    shape = {"layers": 8, "channels": 768, "row_bytes": 3 * 576 * 2, "page": 16}
    bank = Bank.synthetic(experts=7, storage="tied", **shape)
    for batch in TOKENS:
        for stay in STAYS:
            rows += compare("tied", bank, chain(tokens // 2, 7, stay, batch, 0), batch, stay, mode)
    if model is not None and data is not None:
        requests, bank, stay = routed(model, data, 8 * tokens)
        apart = Bank.synthetic(layers=bank.layers, experts=bank.experts, channels=bank.channels, row_bytes=1)
        for batch in TOKENS:
            trace = served(requests, batch)
            rows += compare("routed", apart, trace, batch, stay, mode)
            rows += compare("routed/t", bank, trace[: tokens // 4 // batch], batch, stay, mode)
    return {**summary(rows), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument(
        "--tokens",
        type=int,
        default=4000,
        help="tokens of a trace (half as many for tied pages, up to eight times as many for --model)",
    )
    parser.add_argument("--mode", choices=MODES, default="layer", help="when pages of a step may be evicted")
    parser.add_argument("--model", type=Path, help="folder of a carved model with a router")
    parser.add_argument("--data", type=Path, help="folder of `readme-jax data` with text for it")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    figures = measure(args.tokens, args.mode, args.model, args.data)
    for name, value in figures.items():
        if name != "rows":
            print(f"{name:28} {value:.4f}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
