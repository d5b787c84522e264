"""Scores of any model folder on tasks of the lm-evaluation-harness, and what is kept of a dense model's.

readme-jax tasks --model runs/tuned --tasks hellaswag arc_easy piqa lambada --limit 200 --out runs/tasks

In: a model folder, the names of tasks. Out: tasks.json and a table on the terminal. Needs the extra `tasks`.
"""

import dataclasses
import json
from pathlib import Path

from readme_jax import api, artifacts, cli, sources
from readme_jax.config import free, require
from readme_jax.metrics import Stopwatch
from readme_jax.task_data import full_names, harness, harness_tasks, mean_error, retention

SCORES = ("acc", "acc_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """One evaluation on tasks."""

    model: Path
    """Model to evaluate, routed when it has a router: any stage's folder, a Hugging Face folder, a hub name or a
    .gguf file."""
    tasks: tuple[str, ...]
    """Names of the harness's tasks; a comma may stand between them. Without a hub: hellaswag, arc_easy, arc_challenge,
    piqa, winogrande, lambada."""
    out: Path
    """Folder to write tasks.json to."""
    against: Path | None = None
    """The dense model, for the share of its scores that is kept."""
    limit: int | None = None
    """Items of each task at most, its first ones; none: all of them."""
    batch: int = free(8)
    """Texts of one forward pass."""

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(t for text in self.tasks for t in text.split(",") if t))
        require(len(self.tasks) > 0, "tasks: at least one is needed")
        require(self.limit is None or self.limit >= 1, f"limit={self.limit} must be at least 1")
        require(self.batch >= 1, f"batch={self.batch} must be at least 1")


def main(argv: list[str] | None = None) -> None:
    """Evaluate once; a finished folder of the same config and inputs is only printed again."""
    config: TasksConfig = cli.parse(TasksConfig, argv, __doc__ or "", prog="readme-jax tasks")
    folders = {"model": config.model} | ({"against": config.against} if config.against else {})
    # what no stage has made is known by its name only: a change in it is not seen
    parents = {role: folder for role, folder in folders.items() if (folder / artifacts.MANIFEST).is_file()}
    if not artifacts.finished(config.out, "tasks", config, parents):
        run(config, folders, parents)
    artifacts.verify(config.out, hashes=True)
    result = json.loads((config.out / "tasks.json").read_text())
    print(f"{'task':<16}{'score':<10}{'value':>8}{'stderr':>9}{'n':>7}{'kept':>9}{'stderr':>9}")
    for task, entry in result["tasks"]["model"].items():
        for score in (name for name in SCORES if name in entry):
            kept = result["retention"].get(task, {}).get(score, [None, None])
            cells = [entry[score], entry[f"{score}_stderr"], *kept]
            a, b, c, d = ("-" if cell is None else f"{cell:.4f}" for cell in cells)
            print(f"{task:<16}{score:<10}{a:>8}{b:>9}{entry['n']:>7}{c:>9}{d:>9}")


def run(config: TasksConfig, folders: dict[str, Path], parents: dict[str, Path]) -> None:
    """Run every task on the model, and on the dense one when there is one, and write the result."""
    names = full_names(config.tasks)
    from readme_jax.tasks import TaskModel  # needs the extra

    models = {role: sources.resolve_model(str(folder)) for role, folder in folders.items()}
    chosen = harness_tasks(names)
    with artifacts.building(config.out, "tasks", config, parents) as work:
        watch = Stopwatch()
        tasks: dict[str, dict] = {}
        items: dict[str, dict] = {}
        for role, folder in models.items():
            model = TaskModel(api.load(folder), config.batch)
            tasks[role], items[role] = {}, {}
            for name in names:
                tasks[role][name], items[role][name] = evaluate(model, chosen[name], config.limit)
        kept = {}
        if "against" in items:
            for name, scores in items["model"].items():
                dense = items["against"][name]
                kept[name] = {score: retention(values, dense[score]) for score, values in scores.items()}
        result = {"tasks": tasks, "retention": kept, "items": items}
        artifacts.write_text(work.path / "tasks.json", json.dumps(result))
        work.info |= {"seconds": watch.seconds}


def evaluate(model, task, limit: int | None) -> tuple[dict, dict[str, list[float]]]:
    """One task: its scores with standard errors, n, seconds and tokens; and each score of every item, in order."""
    import lm_eval

    watch, before = Stopwatch(), model.tokens
    found = lm_eval.simple_evaluate(
        model, tasks=[task], limit=limit, bootstrap_iters=0, verbosity="ERROR", task_manager=harness()
    )
    assert found is not None
    (rows,) = found["samples"].values()
    rows = sorted(rows, key=lambda row: row["doc_id"])
    items = {score: [float(row[score]) for row in rows] for score in SCORES if score in rows[0]}
    entry: dict = {"n": len(rows), "seconds": watch.seconds, "tokens": model.tokens - before}
    for score, values in items.items():
        entry[score], entry[f"{score}_stderr"] = mean_error(values)
    return entry, items


if __name__ == "__main__":
    cli.run(main)
