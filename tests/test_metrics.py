"""Metrics on disk, the bar, timings and memory."""

import io
import sys
import time

import numpy as np
import pytest

from readme_jax import metrics
from readme_jax.config import ConfigError
from readme_jax.metrics import Metrics, NonFiniteError, peak_memory_gb, progress, read_metrics, reset_peak_memory


def test_a_line_a_step_and_nothing_twice_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Metrics(path)
    for step in range(5):
        log.log(step, {"loss": step / 2})
    # no close: what was logged is on disk at once; the last line is cut by the kill
    assert read_metrics(path) == [{"step": s, "loss": s / 2} for s in range(5)]
    path.write_text(path.read_text()[:-4])
    log = Metrics(path, resume_at=3)
    for step in range(3, 6):
        log.log(step, {"loss": -1.0})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == list(range(6))
    assert [line["loss"] for line in read_metrics(path)] == [0, 0.5, 1, -1, -1, -1]


def test_a_new_run_begins_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n')
    Metrics(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_the_run(tmp_path, value):
    log = Metrics(tmp_path / "m.jsonl")
    with pytest.raises(NonFiniteError, match=f"step 7: experts/loss is {value}; the run stops"):
        log.log(7, {"a": 1.0, "experts/loss": value})
    log.close()
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"readme-jax\[tensorboard\]"):
        Metrics(tmp_path / "m.jsonl", tensorboard=tmp_path / "events")

    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *entry):
            written.append((self.folder, *entry))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    monkeypatch.setattr(sys.modules["tensorboardX"], "SummaryWriter", Writer, raising=False)
    log = Metrics(tmp_path / "m.jsonl", tensorboard=tmp_path / "events")
    log.log(2, {"loss": 0.5})
    log.close()
    assert written == [(str(tmp_path / "events"), "loss", 0.5, 2), "closed"]


def test_bar_starts_where_a_resumed_stage_is(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(100, "train", initial=40) as bar:
        bar.update(20)
        assert (bar.n, bar.total) == (60, 100)
        assert bar.mininterval == 30.0, "a line every 30 s where there is no terminal"
    assert "train" in sys.stderr.getvalue() and "60.0/100" in sys.stderr.getvalue()


def test_peak_memory_and_time():
    start = metrics.Stopwatch()
    reset_peak_memory()
    before = peak_memory_gb()
    np.ones(40_000_000)  # 0.32 GB, freed at once
    assert 0.25 < peak_memory_gb() - before < 0.6
    if sys.platform == "linux":
        reset_peak_memory()
        assert peak_memory_gb() < before + 0.2
    time.sleep(0.01)
    assert start.seconds >= 0.01
