"""Scores of any model folder on tasks of the lm-evaluation-harness, and what is kept of a dense model's.

readme-jax tasks runs/tuned --tasks hellaswag,arc_easy,piqa,lambada --limit 200 --against runs/dense --out runs/tasks

In: a model folder, the names of tasks. Out: tasks.json and a table on the terminal. Needs the extra `tasks`. The same
program answers to `readme-jax evaluate runs/tuned --tasks ...`.
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

from readme_jax import api, artifacts, cli, sources
from readme_jax.config import DataError, free, require
from readme_jax.metrics import Stopwatch
from readme_jax.sharding import MeshConfig, batch_devices, use_mesh
from readme_jax.task_data import full_names, harness, harness_tasks, mean_error, retention

SCORES = ("acc", "acc_norm", "exact_match")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """One evaluation on tasks."""

    model: Path
    """Model to evaluate, routed when it has a router: any stage's folder, a Hugging Face folder, a hub name or a
    .gguf file."""
    tasks: tuple[str, ...]
    """Names of the harness's tasks and groups; a comma may stand between them. Without a hub: hellaswag, arc_easy,
    arc_challenge, piqa, winogrande, lambada, boolq, openbookqa, sciq, mmlu."""
    out: Path | None = None
    """Folder to write tasks.json to; none: the table is only printed."""
    against: Path | None = None
    """The dense model, for the share of its scores that is kept; or the folder of its own finished `tasks`."""
    limit: int | None = None
    """Items of each task (of a group's tasks, each) at most, its first ones; none: all of them."""
    shots: int | None = None
    """Examples in each prompt; none: the task's own number, for most 0. Without a hub only mmlu has examples."""
    batch: int = free(8)
    """Texts of one forward pass; a multiple of the mesh's batch devices."""
    mesh: MeshConfig = free(MeshConfig())
    """Devices on each mesh axis; `data` splits the texts of a batch."""

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(t for text in self.tasks for t in text.split(",") if t))
        require(len(self.tasks) > 0, "tasks: at least one is needed")
        require(self.limit is None or self.limit >= 1, f"limit={self.limit} must be at least 1")
        require(self.shots is None or self.shots >= 0, f"shots={self.shots} must not be negative")
        require(self.batch >= 1, f"batch={self.batch} must be at least 1")


def main(argv: list[str] | None = None) -> None:
    """Evaluate once; a finished folder of the same config and inputs is only printed again."""
    config: TasksConfig = cli.parse(TasksConfig, argv, __doc__ or "", prog="readme-jax tasks", first="model")
    if config.out is not None:
        return show(finish(config, config.out))
    with tempfile.TemporaryDirectory() as room:
        show(finish(config, Path(room) / "tasks"))


def finish(config: TasksConfig, out: Path) -> dict:
    """The result in `out`, made when it is not there."""
    folders = {"model": config.model} | ({"against": config.against} if config.against else {})
    # what no stage has made is known by its name only: a change in it is not seen
    parents = {role: folder for role, folder in folders.items() if (folder / artifacts.MANIFEST).is_file()}
    if not artifacts.finished(out, "tasks", config, parents):
        run(config, out, folders, parents)
    artifacts.verify(out, hashes=True)
    return json.loads((out / "tasks.json").read_text())


def show(result: dict) -> None:
    """The table on the terminal."""
    print(f"{'task':<16}{'score':<12}{'value':>8}{'stderr':>9}{'n':>7}{'kept':>9}{'stderr':>9}")
    for task, entry in result["tasks"]["model"].items():
        for score in (name for name in SCORES if name in entry):
            kept = result["retention"].get(task, {}).get(score, [None, None])
            cells = [entry[score], entry[f"{score}_stderr"], *kept]
            a, b, c, d = ("-" if cell is None else f"{cell:.4f}" for cell in cells)
            print(f"{task:<16}{score:<12}{a:>8}{b:>9}{entry['n']:>7}{c:>9}{d:>9}")


def run(config: TasksConfig, out: Path, folders: dict[str, Path], parents: dict[str, Path]) -> None:
    """Run every task on the model, and on the dense one when there is one, and write the result."""
    names = full_names(config.tasks)
    from readme_jax.tasks import TaskModel  # needs the extra

    with use_mesh(config.mesh):
        count = batch_devices()
    require(config.batch % count == 0, f"batch={config.batch} must be a multiple of the {count} devices that split it")
    known = {} if config.against is None else finished_scores(config, config.against, names)
    models = {role: sources.resolve_model(str(folder)) for role, folder in folders.items() if role not in known}
    chosen = harness_tasks(names, config.shots)
    with artifacts.building(out, "tasks", config, parents) as work:
        watch = Stopwatch()
        tasks, items = ({role: found[kind] for role, found in known.items()} for kind in ("tasks", "items"))
        for role, folder in models.items():
            model, tasks[role], items[role] = None, {}, {}
            for name in names:
                part = work.path / f"{role}.{name}.json"  # a stopped run has what it had scored
                if not part.is_file():
                    model = model or TaskModel(api.load(folder, mesh=config.mesh), config.batch)
                    artifacts.write_text(part, json.dumps(evaluate(model, name, chosen[name], config)))
                    work.kept = True
                work.scratch.append(part.name)
                tasks[role][name], items[role][name] = json.loads(part.read_text())
        kept = {}
        if "against" in items:
            for name, scores in items["model"].items():
                dense, read = items["against"][name], [tasks[role][name].get("read") for role in ("model", "against")]
                require(
                    read[0] == read[1],
                    f"against={config.against}: task {name} has other items or prompts there",
                    DataError,
                )
                kept[name] = {score: retention(values, dense[score]) for score, values in scores.items()}
        result = {"tasks": tasks, "retention": kept, "items": items}
        artifacts.write_text(work.path / "tasks.json", json.dumps(result))
        work.info |= {"seconds": watch.seconds}


def finished_scores(config: TasksConfig, folder: Path, names: list[str]) -> dict[str, dict]:
    """What a finished result of this program has of its model, under the role `against`; {} for a model folder.
    ConfigError when it lacks a task or was made with other options."""
    if not (folder / "tasks.json").is_file():
        return {}
    made = artifacts.verify(folder, hashes=True)["config"]
    for name in ("limit", "shots"):
        then, now = made.get(name), getattr(config, name)
        require(then == now, f"against={folder}: was made with {name}={then}, not {now}")
    result = json.loads((folder / "tasks.json").read_text())
    absent = [name for name in names if name not in result["tasks"]["model"]]
    require(not absent, f"against={folder}: has no scores of {', '.join(absent)}")
    return {"against": {kind: {name: result[kind]["model"][name] for name in names} for kind in ("tasks", "items")}}


def evaluate(model, name: str, task, config: TasksConfig) -> tuple[dict, dict[str, list[float]]]:
    """One task or group: its scores with standard errors, n, seconds, tokens and `read`, a hash of items and prompts;
    and each score of every item, in order. Every item of a group counts the same, whatever task it is of."""
    import lm_eval

    watch, before = Stopwatch(), model.tokens
    found = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        limit=config.limit,
        num_fewshot=config.shots,
        bootstrap_iters=0,
        verbosity="ERROR",
        task_manager=harness(),
    )
    assert found is not None
    rows = []
    for part in sorted(found["samples"]):  # where a text is read in several ways, an item comes once for each
        first = found["samples"][part][0]["filter"]
        mine = [row for row in found["samples"][part] if row["filter"] == first]
        rows += sorted(mine, key=lambda row: row["doc_id"])
    items = {score: [float(row[score]) for row in rows] for score in SCORES if all(score in row for row in rows)}
    require(bool(items), f"task {name}: none of its scores is one of {', '.join(SCORES)}", DataError)
    read = hashlib.sha256("".join(row["doc_hash"] + row["prompt_hash"] for row in rows).encode()).hexdigest()
    entry: dict = {"n": len(rows), "seconds": watch.seconds, "tokens": model.tokens - before, "read": read}
    for score, values in items.items():
        entry[score], entry[f"{score}_stderr"] = mean_error(values)
    return entry, items


if __name__ == "__main__":
    cli.run(main)
