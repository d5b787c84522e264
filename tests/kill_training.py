"""Kill a training run at random moments, checkpoint writes included, until it has ended: nothing may be lost.

python tests/kill_training.py FOLDER [--kills 20] [--processes 2] [--seed 0]

FOLDER: where to work. A tiny model is trained once without interruption, then again with SIGKILL after a random time,
to one of the processes or to all of them; every other kill falls into the writing of a checkpoint. Every start must
resume by itself from what is there, a process that loses another must leave with exit code 76, and the tuned tensors
and metrics must be bit-equal in the end. Prints a line a kill and a summary; exit code 1 when anything differs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiny
import yaml
from processes import ended, start, weights

SEQ = 32


def prepare(root: Path) -> None:
    """Model, text, statistics and a carved model below `root`."""
    tiny.write_model(root / "source")
    domains = {n: {"source": "files", "path": str(p)} for n, p in tiny.write_text(root / "text").items()}
    data = {"seq": SEQ, "train_tokens": 4000, "eval_tokens": 0, "calibration_tokens": 320, "domains": domains}
    write(root / "data.yaml", {"model": root / "dense", "out": root / "data", "data": data})
    statistics = ["--model", root / "dense", "--statistics", root / "statistics"]
    for words in (
        ["import", "--source", root / "source", "--out", root / "dense"],
        ["data", "--config", root / "data.yaml"],
        ["calibrate", "--model", root / "dense", "--data", root / "data", "--out", root / "statistics"],
        ["carve", *statistics, "--out", root / "carved"],
    ):
        check(ended(start(*words, devices=1, logs=root / "prepare.log")) == [0], f"readme-jax {words[0]}")
    phase = {"steps": 6, "batch": 8}
    write(
        root / "alternate.yaml",
        {
            "model": root / "carved",
            "data": root / "data",
            "out": root / "killed",
            "rounds": 8,
            "router": phase | {"label_batch": 8, "shape": {"width": 16, "heads": 2}, "optim": {"lr": 1e-2}},
            "experts": phase | {"optim": {"lr": 2e-3}},
            "mesh": {"data": 4, "model": 2},
            "checkpoint": {"steps": 1},
        },
    )


def write(path: Path, config: dict) -> None:
    """A config as YAML."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))


def check(ok: bool, what: str) -> None:
    """Stop with the words when something is wrong."""
    if not ok:
        sys.exit(f"FAILED: {what}")


def checkpoints(folder: Path) -> dict[int, bool]:
    """Steps of the checkpoints that are there, and whether each is whole."""
    found = (p for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    return {int(p.name): (p / "whole.json").exists() for p in found}


def writing(folder: Path) -> bool:
    """A checkpoint is being written: its folder, or Orbax's temporary one, is there without its mark."""
    names = {p.name for p in (folder / "checkpoints").glob("*")}
    return any(not name.isdigit() or not (folder / "checkpoints" / name / "whole.json").exists() for name in names)


def main() -> None:
    """The run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root, chance = args.folder.absolute(), random.Random(args.seed)
    root.mkdir(parents=True)
    prepare(root)
    options = {"processes": args.processes, "devices": 8 // args.processes, "cache": str(root / "compiled")}

    def run(out: str, logs: str) -> list[subprocess.Popen]:
        words = ("alternate", "--config", root / "alternate.yaml", "--out", root / out)
        return start(*words, logs=root / logs, **options)

    began = time.monotonic()
    check(ended(run("whole", "whole.log"), 600) == [0] * args.processes, "the run without interruption")
    print(f"without interruption: {time.monotonic() - began:.0f} s", flush=True)

    partial = root / ".killed.partial"
    done, during, ways, longest = 0, 0, {"one": 0, "all": 0}, 0.0
    while done < args.kills:
        before = max((step for step, whole in checkpoints(partial).items() if whole), default=0)
        running = run("killed", f"kill-{done}.log")
        early, into = chance.random() < 0.3, chance.random() < 0.6
        if early:  # anywhere: while starting, compiling, labelling
            time.sleep(chance.uniform(1, 15))
        else:  # some steps after the first new checkpoint, every other time in the midst of writing one
            ahead = before + chance.randint(1, 2)
            while all(p.poll() is None for p in running) and not checkpoints(partial).get(ahead):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            while into and all(p.poll() is None for p in running) and not writing(partial):
                time.sleep(0.001)
        if any(p.poll() is not None for p in running):
            codes = ended(running)
            check(codes == [0] * args.processes, f"exit codes {codes} of a run that nobody killed")
            print("ended before it was killed: the steps are used up", flush=True)
            break
        caught = writing(partial)
        # Before the processes have found each other it is JAX that says who is missing: then all are killed.
        one = args.processes > 1 and not early and chance.random() < 0.5
        victims = [chance.randrange(args.processes)] if one else list(range(args.processes))
        moment = time.monotonic()
        for victim in victims:
            running[victim].send_signal(signal.SIGKILL)
        codes = ended(running, 100)
        seconds = time.monotonic() - moment
        expected = [-signal.SIGKILL if p in victims else 76 for p in range(args.processes)]
        check(codes == expected, f"kill {done}: exit codes {codes}, not {expected}")
        longest = max(longest, seconds) if one else longest
        during, done = during + caught, done + 1
        ways["one" if one else "all"] += 1
        whole = sorted(step for step, good in checkpoints(partial).items() if good)
        words = f"process {victims[0]}" if one else "all"
        print(
            f"kill {done}: {words}{', writing a checkpoint' if caught else ''}; codes {codes}, whole: {whole}",
            flush=True,
        )

    if not (root / "killed").exists():
        check(ended(run("killed", "last.log"), 600) == [0] * args.processes, "the last start")
    a, b = weights(root / "whole"), weights(root / "killed")
    differ = [name for name in a if name not in b or not np.array_equal(a[name], b[name])]
    same = (root / "whole/metrics.jsonl").read_text() == (root / "killed/metrics.jsonl").read_text()
    skipped = sum(p.read_text().count("is skipped") for p in root.glob("kill-*.log.*"))
    print(
        f"{done} kills ({ways['one']} of one process, {ways['all']} of all; {during} while a checkpoint was written), "
        f"{skipped} damaged checkpoints skipped, survivors ended within {longest:.1f} s; "
        f"{len(a)} tensors, {len(differ)} differ; metrics {'equal' if same else 'differ'}"
    )
    check(done == args.kills, f"the run was over after {done} of {args.kills} kills: give it more rounds, or kill less")
    check(not differ and same and a.keys() == b.keys(), f"not bit-equal: {differ}")


if __name__ == "__main__":
    main()
