"""Task scores of a dense model through this package beside the harness's own Hugging Face backend, item by item.

python benchmarks/task_parity.py --model runs/dense --limit 200 --cache runs/parity --json runs/parity.json

In: a Hugging Face folder of a dense model. Both sides run the same first items of each task in float32 on the CPU,
texts of similar length together. What one side scores on 50 items is one file of --cache, so a stopped run goes on from
there; `--sides ours --tasks piqa` computes only that part. Out: scores of both, the largest difference of a
log-likelihood, and every item whose verdict differs with the margin that decided it. Exit status 1 if one of those is
not a near tie.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from readme_jax import api, artifacts, cli, sources
from readme_jax.config import require
from readme_jax.task_data import full_names, harness, harness_tasks, mean_error

SIDES = ("ours", "hf")
TASKS = ("piqa", "arc_easy", "lambada_openai", "hellaswag")
SCORES = ("acc", "acc_norm", "perplexity")
PART = 50  # items of one file


def load(side: str, folder: Path, batch: int):
    """The model as the harness sees it."""
    if side == "ours":
        from readme_jax.tasks import TaskModel

        return TaskModel(api.load(folder), batch)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch)


def load_tasks(names: list[str]) -> dict:
    """The harness's task of each name."""
    found = harness_tasks(names) if names else {}
    return {name: harness().load([task])["tasks"][name] for name, task in found.items()}


def score(model, task, items_N: range) -> dict:
    """Per item, in order: log-likelihood and greediness of each choice, the choices' lengths, every score."""
    import lm_eval

    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        samples={task.task_name: list(items_N)},
        bootstrap_iters=0,
        verbosity="ERROR",
        task_manager=harness(),
    )
    assert found is not None
    (rows,) = found["samples"].values()
    items = []
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        texts = [text for _, text in row["arguments"]]
        assert all(text.startswith(" ") for text in texts)  # the delimiter, no part of the choice
        items.append(
            {
                "id": row["doc_id"],
                "prompt": row["prompt_hash"],
                "logp": [logp for logp, _ in row["filtered_resps"]],
                "greedy": [bool(greedy) for _, greedy in row["filtered_resps"]],
                "length": [len(text) - 1 for text in texts],
                "scores": {name: float(row[name]) for name in SCORES if name in row},
            }
        )
    return {"seconds": time.perf_counter() - start, "items": items}


def values(item: dict, name: str) -> np.ndarray:
    """What the choices are ranked by: log-likelihood in nats, for acc_norm per character."""
    return np.array(item["logp"]) / (np.array(item["length"]) if name == "acc_norm" else 1)


def difference(a: dict, b: dict, name: str) -> dict:
    """Why one side has an item right and the other not: the lead of the best choice over the next on both sides, and
    the largest shift of a choice. A lead of at most two shifts is a tie. Leads are None where there is one choice:
    greediness is the verdict then."""
    shift = float(np.abs(values(a, name) - values(b, name)).max())
    leads = [float(np.diff(np.sort(values(x, name))[-2:])[0]) if len(x["logp"]) > 1 else None for x in (a, b)]
    tie = all(lead is not None and lead <= 2 * shift for lead in leads)
    logp = {"ours": a["logp"], "hf": b["logp"]}
    return {"id": a["id"], "score": name, "lead": dict(zip(SIDES, leads)), "shift": shift, "tie": tie, "logp": logp}


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """Scores of both, how far apart they are, and the items that one side has right and the other wrong."""
    for a, b in zip(ours, theirs, strict=True):
        require((a["id"], a["prompt"]) == (b["id"], b["prompt"]), f"item {a['id']}: the sides saw different prompts")
    gaps = [float(np.abs(np.subtract(a["logp"], b["logp"])).max()) for a, b in zip(ours, theirs)]
    sides = {}
    for side, items in (("ours", ours), ("hf", theirs)):
        sides[side] = {}
        for name in items[0]["scores"]:
            mean, error = mean_error(item["scores"][name] for item in items)
            if name == "perplexity":  # of an item it is the log-probability
                mean, error = float(np.exp(-mean)), None if error is None else float(np.exp(-mean) * error)
            sides[side] |= {name: mean, f"{name}_stderr": error}
    pairs = list(zip(ours, theirs))
    differ = [
        difference(a, b, name)
        for name in ("acc", "acc_norm")
        for a, b in pairs
        if a["scores"].get(name) != b["scores"].get(name)
    ]
    greedy = [a["id"] for a, b in pairs if a["greedy"] != b["greedy"]]
    return {
        "n": len(ours),
        "requests": sum(len(item["logp"]) for item in ours),
        "scores": sides,
        "largest_gap": max(gaps),
        "mean_gap": float(np.mean(gaps)),
        "differ": differ,
        "greedy_differs": greedy,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a dense model")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="multiple choice or last word tasks")
    parser.add_argument("--limit", type=int, default=200, help="items of each task, its first ones")
    parser.add_argument("--batch", type=int, default=8, help="texts of one forward pass")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="what to compute now")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what each side scored on each task")
    parser.add_argument("--json", type=Path, help="file to write the comparison to")
    args = parser.parse_args(argv)
    names = full_names(args.tasks)
    require(args.limit >= 1, f"limit={args.limit} must be at least 1")
    folder = sources.resolve_model(args.model)
    args.cache.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + PART, args.limit)) for start in range(0, args.limit, PART)]

    def file(side: str, name: str, part: range) -> Path:
        return args.cache / f"{side}-{name}-{part.start}-{part.stop}.json"

    for side in args.sides:
        left = [(name, part) for name in names for part in parts if not file(side, name, part).is_file()]
        tasks = load_tasks(list(dict.fromkeys(name for name, _ in left)))
        model = load(side, folder, args.batch) if left else None
        for name, part in left:
            result = score(model, tasks[name], part)
            artifacts.write_text(file(side, name, part), json.dumps({"model": str(folder)} | result))
            print(f"{side} {name} {part.start}-{part.stop}: {result['seconds']:.0f} s", flush=True)
    if not all(file(side, name, part).is_file() for side in SIDES for name in names for part in parts):
        return
    report = {}
    for name in names:
        found = {side: [json.loads(file(side, name, part).read_text()) for part in parts] for side in SIDES}
        alike = all(piece["model"] == str(folder) for pieces in found.values() for piece in pieces)
        require(alike, f"{args.cache}: holds scores of another model")
        ours, theirs = ([item for piece in found[side] for item in piece["items"]] for side in SIDES)
        report[name] = compare(ours, theirs)
        report[name]["seconds"] = {side: sum(piece["seconds"] for piece in found[side]) for side in SIDES}
    if args.json:
        artifacts.write_text(args.json, json.dumps(report, indent=1))
    show(report)
    sys.exit(any(not item["tie"] for entry in report.values() for item in entry["differ"]))


def show(report: dict) -> None:
    print(f"{'task':<16}{'score':<12}{'ours':>9}{'hf':>9}{'stderr':>9}{'differ':>8}{'largest gap':>13}{'seconds':>12}")
    for task, entry in report.items():
        for name in (name for name in SCORES if name in entry["scores"]["ours"]):
            ours, theirs = (entry["scores"][side][name] for side in SIDES)
            error = entry["scores"]["hf"][f"{name}_stderr"]
            count = sum(item["score"] == name for item in entry["differ"])
            seconds = " / ".join(f"{entry['seconds'][side]:.0f}" for side in SIDES)
            cells = f"{ours:>9.4f}{theirs:>9.4f}{'-' if error is None else f'{error:.4f}':>9}{count:>8}"
            print(f"{task:<16}{name:<12}{cells}{entry['largest_gap']:>13.2e}{seconds:>12}")
    for task, entry in report.items():
        for item in entry["differ"]:
            leads = [item["lead"][side] for side in SIDES]
            told = "greediness" if None in leads else f"lead {leads[0]:.2e} / {leads[1]:.2e}"
            why = "a tie" if item["tie"] else "NOT A TIE"
            print(f"{task} item {item['id']} {item['score']}: {told}, shift {item['shift']:.2e}: {why}")


if __name__ == "__main__":
    cli.run(main)
