"""The training program beside that of another commit, each as it is: its own `train/alternate.py`, its own library.

In: folders of a carved model and of data, drawn, which both programs read. Out: tokens/s of both, by phase. Each run is
a process of its own; the only thing put into it notes when `Metrics.log` is called, which both programs do once a step
with the loss that they have waited for.
"""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import yaml
from train_loops import CE, LR, RECORDS, draw_model, expert_sizes

from readme_jax import artifacts, hf
from readme_jax.packing import record_paths

ROOT = Path(__file__).resolve().parents[1]
WARM = 5  # steps at the start of a phase that are not timed: compilation is among them
NOTED = """
import json, runpy, sys, time
tree, config, times = sys.argv[1:]
sys.path.insert(0, tree)
from readme_jax import metrics
log, seen = metrics.Metrics.log, {}
def noted(self, step, *rest, **named):
    seen.setdefault(step, (time.perf_counter(), time.process_time()))
    return log(self, step, *rest, **named)
metrics.Metrics.log = noted
assert metrics.__file__.startswith(tree), metrics.__file__
sys.argv = ["alternate", "--config", config]
runpy.run_path(tree + "/train/alternate.py", run_name="__main__")
open(times, "w").write(json.dumps(sorted(seen.items())))
"""


def tree_of(commit: str, room: Path) -> Path:
    """The files of a commit of this repository, below `room`."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if packed.returncode:
        sys.exit(f"--against {commit}: {packed.stderr.decode().strip()}")
    folder = room / "against"
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def write_inputs(room: Path, model: str, seq: int, dtype: str, batch: int, steps: int, way: str, remat: str) -> dict:
    """A carved model and records on disk; the config of a run over them, in terms that every commit knows."""
    rng = np.random.default_rng(0)
    _, cfg, params = draw_model(model)
    sizes, table_LEC = expert_sizes(cfg, rng)
    with artifacts.building(room / "carved", "carve", {}, {}) as work, hf.Writer(work.path) as writer:
        hf.save_params(writer, cfg, params, experts=table_LEC)
        config = hf.config_to_hf(cfg, {}, experts=sizes)
        (work.path / "config.json").write_text(json.dumps(config))
    with artifacts.building(room / "data", "data", {"seq": seq, "domains": {"text": {"weight": 1.0}}}, {}) as work:
        ids_NT = rng.integers(1, cfg.vocab, (RECORDS, seq), np.int32)
        for path, array in zip(record_paths(work.path, "text", "train"), (ids_NT, np.ones_like(ids_NT))):
            np.save(path, array)
        work.info |= {"inputs": {"vocab": cfg.vocab}}
    phase = {"steps": WARM + steps, "batch": batch, "optim": {"lr": LR}}
    return {
        "model": str(room / "carved"),
        "data": str(room / "data"),
        "rounds": 1,
        "router": phase,
        "experts": phase | {"ce_weight": CE, "way": way, "remat": remat},
        "dtype": dtype,
        "mesh": {"data": 1},
    }


def seconds_of_a_step(tree: Path, config: dict, room: Path) -> dict[str, np.ndarray]:
    """Run the program of `tree` once; mean seconds of the timed steps by phase: of the clock, and of all its threads'
    CPU time."""
    path, times, out = room / "alternate.yaml", room / "times.json", room / f"tuned-{len(list(room.iterdir()))}"
    path.write_text(yaml.safe_dump(config | {"out": str(out)}))
    ran = subprocess.run(
        [sys.executable, "-c", NOTED, str(tree), str(path), str(times)], cwd=room, capture_output=True, text=True
    )
    if ran.returncode:
        sys.exit(f"{tree}: {ran.stderr.strip()[-2000:]}")
    at, count = np.array([when for _, when in json.loads(times.read_text())]), config["router"]["steps"]
    assert len(at) == 2 * count, "one line a step"
    found = {}
    for name, first in (("router", 0), ("experts", count)):
        # the last step of a phase is waited for before it is saved: it is no step like the others
        timed = at[first + WARM - 1 : first + count - 1]
        found[name] = (timed[-1] - timed[0]) / (len(timed) - 1)
    return found


def compare(room: Path, commit: str, turns: int, **options) -> dict[str, np.ndarray]:
    """Tokens a second [turns, 2, 2] by phase: of this tree and of the commit, by the clock and by CPU time. The two
    take turns in going first. options: of `write_inputs`."""
    trees, config = {"ours": ROOT, "theirs": tree_of(commit, room)}, write_inputs(room, **options)
    tokens = options["batch"] * options["seq"]
    found: dict[str, list] = {"router": [], "experts": []}
    for turn in range(turns):
        order = ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours")
        took = {name: seconds_of_a_step(trees[name], config, room) for name in order}
        for phase, each in found.items():
            each.append([tokens / took[name][phase] for name in trees])
    return {phase: np.array(each) for phase, each in found.items()}
