"""Several processes train together: killed, asked to stop, one of them lost; and on another number of processes."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from processes import ended, free_port, start, weights

from readme_jax import carve as carving
from readme_jax.checkpoint import checksums
from readme_jax.metrics import read_metrics

RUN = {
    "rounds": 2,
    "router__steps": 2,
    "router__batch": 4,
    "router__label_batch": 4,
    "experts__steps": 6,
    "experts__batch": 4,
    "checkpoint__steps": 2,
    "mesh": {"data": 4, "model": 2},
}
# Programs of this size run once a start: a third of the time goes into compiling them well.
TWO = {"processes": 2, "devices": 4, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def until(path, running):
    """Wait for a file that one of the processes makes."""
    while not path.exists():
        assert all(process.poll() is None for process in running), "ended before it was killed"
        time.sleep(0.02)


def said(logs, process):
    """What a process printed, without what gloo says of its connections, whose lines threads may tear apart."""
    lines = open(f"{logs}.{process}").read().replace("\r", "\n").splitlines()
    return [line for line in lines if re.search("[a-z]{4}", line) and "[Gloo]" not in line and "peer ranks" not in line]


def errors(logs, process):
    return [line for line in said(logs, process) if line.startswith("error: ")]


@pytest.fixture(scope="module")
def runs(stages, tmp_path_factory):
    """A run of 2 processes x 4 devices to its end, and the same run killed: first one of them, then both."""
    root = tmp_path_factory.mktemp("hosts")
    cache = str(root / "compiled")

    def go(out, logs):
        config = stages.yaml("alternate", root / out, **RUN)
        return start("alternate", "--config", config, logs=root / logs, cache=cache, **TWO)

    assert ended(go("whole", "whole.log")) == [0, 0], said(root / "whole.log", 0)
    partial = root / ".killed.partial"
    running = go("killed", "one.log")
    until(partial / "checkpoints/4/whole.json", running)
    running[1].kill()
    began = time.monotonic()
    assert ended(running) == [76, -signal.SIGKILL]
    seconds = time.monotonic() - began
    shutil.copytree(partial, root / "snapshot")
    marks = {int(p.parent.name): json.loads(p.read_text()) for p in partial.glob("checkpoints/*/whole.json")}
    newest = partial / "checkpoints" / str(max(marks))
    harmed = next(newest / name for name in marks[max(marks)]["files"] if "experts/ocdbt.process_1/d/" in name)
    content = harmed.read_bytes()
    harmed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    running = go("killed", "both.log")
    until(partial / "checkpoints/8/whole.json", running)
    for process in running:
        process.kill()
    assert ended(running) == [-signal.SIGKILL] * 2
    assert ended(go("killed", "last.log")) == [0, 0], said(root / "last.log", 0)
    return root, seconds, marks, harmed


def test_killed_one_then_both_ends_bit_equal(runs):
    root, seconds, marks, harmed = runs
    assert seconds < 10
    (line,) = errors(root / "one.log", 0)
    assert line.startswith("error: process 1 is gone (its connection closed); process 0 ends too.")
    told = [line for log in ("both.log", "last.log") for line in said(root / log, 0) if line.startswith("resumed at")]
    resumed = [int(line.split()[3]) for line in told]
    *_, before, newest = sorted(marks)
    assert len(resumed) == 2 and resumed[0] == before < newest and resumed[1] >= 8
    warned = [[line for line in said(root / "both.log", p) if line.startswith("warning: ")] for p in (0, 1)]
    assert warned == [
        [f"warning: checkpoint {newest} is skipped: {harmed}: its checksum differs from when it was written"], []
    ]  # fmt: skip
    for step, mark in marks.items():
        folder = root / "snapshot/checkpoints" / str(step)
        there = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "whole.json"]
        assert mark["files"] == checksums(folder, sorted(there)), "of both processes"
    a, b = weights(root / "whole"), weights(root / "killed")
    assert a.keys() == b.keys() and [n for n in a if not np.array_equal(a[n], b[n])] == []
    assert (root / "whole/metrics.jsonl").read_text() == (root / "killed/metrics.jsonl").read_text()
    assert [line["step"] for line in read_metrics(root / "killed/timing.jsonl")] == list(range(16))
    for process in (0, 1):
        assert not errors(root / "last.log", process)
    assert said(root / "last.log", 1) == [], "one process speaks"


@pytest.mark.parametrize("mesh", [{"data": 4, "model": 2}, {"data": 1}], ids=["eight devices", "one device"])
def test_goes_on_in_one_process(runs, stages, tmp_path, mesh, capsys):
    """A checkpoint of two processes, on eight devices of one and on one device: what rounding leaves apart."""
    root = runs[0]
    shutil.copytree(root / "snapshot", tmp_path / ".out.partial")
    stages.alternate(tmp_path / "out", **(RUN | {"mesh": mesh}))
    assert "resumed at step" in capsys.readouterr().out
    a, b = weights(root / "whole"), weights(tmp_path / "out")
    first = weights(stages.carved)
    for name in a:
        moved = np.abs(a[name] - first[name]).max() if name in first else 1.0
        apart = np.abs(a[name] - b[name]).max()
        assert apart <= max(2e-2 * moved, 1e-6), (name, apart, moved)
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (root / "whole", tmp_path / "out")]
    for whole, other in zip(*lines, strict=True):
        for key, value in whole.items():
            if key.endswith("loss"):
                assert other[key] == pytest.approx(value, rel=1e-3), (whole["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_gone(runs, stages, tmp_path, frozen):
    """Its system still answers for it; the other one ends as for a death, before JAX ends it with a stack trace."""
    root = runs[0]
    config = stages.yaml("alternate", tmp_path / "out", **(RUN | {"hosts__timeout": 5}))
    running = start("alternate", "--config", config, logs=tmp_path / "log", cache=str(root / "compiled"), **TWO)
    until(tmp_path / ".out.partial/checkpoints/2/whole.json", running)
    running[frozen].send_signal(signal.SIGSTOP)
    began, other = time.monotonic(), 1 - frozen
    assert ended([running[other]]) == [76], said(tmp_path / "log", other)
    assert time.monotonic() - began < 10
    running[frozen].kill()
    (line,) = errors(tmp_path / "log", other)
    head = f"error: process {frozen} is gone (no sign of life for 5 s); process {other} ends too."
    assert line.startswith(head) and said(tmp_path / "log", other)[-1] == line


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_its_code(runs, stages, tmp_path):
    """To one of two; the other learns of it. Then the run goes on to the same end."""
    root = runs[0]
    config = stages.yaml("alternate", tmp_path / "out", **(RUN | {"checkpoint__steps": 0}))
    command = ("alternate", "--config", config)
    options = {"logs": tmp_path / "log", "cache": str(root / "compiled"), **TWO}
    running = start(*command, **options)
    until(tmp_path / ".out.partial/checkpoints/2/whole.json", running)
    running[1].send_signal(signal.SIGTERM)
    assert ended(running) == [75, 75]
    assert said(tmp_path / "log", 0)[-1].startswith("stopped by another process; saved at step ")
    saved = int(said(tmp_path / "log", 1)[-1].split()[6])
    assert said(tmp_path / "log", 1)[-1] == f"stopped by SIGTERM; saved at step {saved} of 16"
    assert max(int(p.name) for p in (tmp_path / ".out.partial/checkpoints").iterdir()) == saved
    assert ended(start(*command, **options)) == [0, 0]
    a, b = weights(root / "whole"), weights(tmp_path / "out")
    assert [n for n in a if not np.array_equal(a[n], b[n])] == []


@pytest.mark.slow
def test_parallel_experts_of_two_processes(stages, tmp_path):
    """Both compile the same programs in the same order; one is killed, and the run ends bit-equal."""
    separate, cache = tmp_path / "separate", str(tmp_path / "compiled")
    carving.to_separate(stages.tuned, separate)
    run = {"model": separate, "router__steps": 0, "experts__kd_weight": 0.0, "experts__ce_weight": 1.0}
    run |= {"experts__steps": 6, "experts__batch": 6, "experts__way": "parallel", "checkpoint__steps": 2}
    run |= {"mesh": {"data": 2, "expert": 3}}

    def go(out, logs):
        config = stages.yaml("alternate", tmp_path / out, **run)
        return start("alternate", "--config", config, logs=tmp_path / logs, cache=cache, **(TWO | {"devices": 3}))

    assert ended(go("whole", "whole.log")) == [0, 0], said(tmp_path / "whole.log", 0)
    assert any(line.startswith("compile: 100%") for line in said(tmp_path / "whole.log", 0))
    assert said(tmp_path / "whole.log", 1) == []
    running = go("killed", "one.log")
    until(tmp_path / ".killed.partial/checkpoints/2/whole.json", running)
    running[1].kill()
    assert ended(running) == [76, -signal.SIGKILL]
    assert ended(go("killed", "last.log")) == [0, 0], said(tmp_path / "last.log", 0)
    assert any(line.startswith("resumed at step") for line in said(tmp_path / "last.log", 0))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert [n for n in a if not np.array_equal(a[n], b[n])] == []
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


def test_bad_input_is_one_line_of_each(stages, tmp_path):
    """What every process finds wrong, each says once and all leave with 2."""
    config = stages.yaml("alternate", tmp_path / "out", **(RUN | {"experts__batch": 6}))
    running = start("alternate", "--config", config, logs=tmp_path / "log", **TWO)
    assert ended(running) == [2, 2]
    rule = "experts.batch=6 must be a multiple of the mesh's 4 batch devices"
    assert errors(tmp_path / "log", 0) == [f"error: {rule}"]
    assert errors(tmp_path / "log", 1) == [f"error: process 1: {rule}"]
    assert not list(tmp_path.glob(".out*")), "nothing is left of it"


def test_processes_with_other_configs_do_not_begin(stages, tmp_path):
    """Each says which field differs, and where."""
    config = stages.yaml("alternate", tmp_path / "out", **RUN)
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    running = []
    for process, lr in enumerate(("0.002", "0.5")):
        words = ("alternate", "--config", config, "--experts.optim.lr", lr)
        running += start(*words, devices=4, logs=tmp_path / f"log{process}", JAX_PROCESS_ID=str(process), **env)
    assert ended(running) == [2, 2]
    rule = "experts.optim.lr=0.5 in process 1, 0.002 in process 0: every process needs the same config and versions"
    assert errors(tmp_path / "log0", 0) == [f"error: {rule}"]
    assert errors(tmp_path / "log1", 0) == [f"error: process 1: {rule}"]
    assert not list(tmp_path.glob(".out*")), "no work was begun"


def test_a_process_that_never_comes(stages, tmp_path):
    config = stages.yaml("alternate", tmp_path / "out", **(RUN | {"hosts__start_timeout": 3}))
    running = start("alternate", "--config", config, devices=4, logs=tmp_path / "log", JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")  # fmt: skip  # noqa: E501
    assert ended(running) == [76]
    (line,) = errors(tmp_path / "log", 0)
    assert "process 1 of 2: not all processes came at 127.0.0.1:1 within 3 s" in line
