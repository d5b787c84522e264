"""Pieces of the loop: batches made ahead, rows a process reads, what is logged and shown, the profiler's window."""

import io
import sys
import threading

import jax
import numpy as np
import pytest

from readme_jax import loop, metrics
from readme_jax.config import ConfigError
from readme_jax.data import Batches, Records
from readme_jax.loop import Ahead, PhaseFigures, ProfileConfig, Profiler, Timer, Watch, place_batch
from readme_jax.metrics import Metrics, NonFiniteError, Pace, read_metrics
from readme_jax.sharding import MeshConfig, put, use_mesh


def batches(accum=2, batch=8):
    ids = np.arange(40 * 16, dtype=np.int32).reshape(40, 16)
    return Batches({"a": Records(ids, ids % 3)}, {"a": 1.0}, batch=batch, accum=accum)


class Targets:
    """What a cache of records is to a batch."""

    fields = {"target": ((16, 3), np.float32), "rest": ((16,), np.int32)}

    def __getitem__(self, index):
        return {
            "target": np.asarray(index, np.float32)[..., None, None] + np.zeros((16, 3), np.float32),
            "rest": np.asarray(index, np.int32)[..., None] + np.arange(16, dtype=np.int32),
        }


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1), (2, 1, 4)], ids=str)
def test_a_placed_batch_is_the_batch(shape):
    own = batches()
    with use_mesh(MeshConfig(data=shape[0], expert=shape[1], model=shape[2])):
        placed = place_batch(own, 3, Targets())
        assert jax.typeof(placed["ids"]).sharding.spec == jax.P(None, ("data", "expert"), None)
    for key in ("ids", "segments"):
        np.testing.assert_array_equal(placed[key], own[3][key])
    np.testing.assert_array_equal(placed["target"][:, :, 5, 1], own[3]["index"])
    np.testing.assert_array_equal(placed["rest"][:, :, 5], own[3]["index"] + 5)


def test_only_rows_of_own_devices_are_read(monkeypatch):
    own, read = batches(), []
    rows = own.rows
    monkeypatch.setattr(own, "rows", lambda step, start, stop: read.append((start, stop)) or rows(step, start, stop))
    with use_mesh(MeshConfig(data=4, model=2)):
        place_batch(own, 0)
    assert sorted(read) == [(0, 2), (2, 4), (4, 6), (6, 8)], "once each, whatever shares them"


def test_batches_are_made_ahead(mesh):
    made, gate = [], threading.Event()

    def make(tick):
        made.append((tick, threading.current_thread() is threading.main_thread()))
        if tick == 3:
            gate.set()
        if tick == 4:
            raise OSError("disk")
        return tick

    ahead = Ahead(make, 5, Pace())
    assert [ahead(0), ahead(1)] == [0, 1]
    assert gate.wait(10), "the next two are made while nobody waits"
    assert made == [(tick, False) for tick in range(4)]
    assert [ahead(2), ahead(3)] == [2, 3]
    with pytest.raises(OSError, match="disk"):
        ahead(4)
    ahead.close()


def watch(path, monkeypatch, **changes):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    phase = PhaseFigures(2, 100, 3e9, np.array([0.5, 0.25, 0.125, 0.0]), lambda step: np.array([[step, 7, 7]]))
    options = {"peak": 1e12, "window": 2, "silent": False} | changes
    return Watch(Metrics(path), Pace(), {"experts": phase}, lambda tick: ("experts", tick), 2, **options)


def test_a_step_is_logged_when_the_next_one_is_under_way(tmp_path, mesh, monkeypatch):
    own = watch(tmp_path / "metrics.jsonl", monkeypatch)
    for tick in range(3):
        own.step(tick, {"loss": put(np.float32(tick)), "load": put(np.array([0.75, 0.25], np.float32))})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == tick
    assert own.score() == 0.5
    own.flush()
    assert own.score() == 1.5, "the last two"
    own.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[1] == {
        "step": 1, "experts/loss": 1.0, "experts/load_max_over_mean": 1.5, "experts/unused_experts": 0.0,
        "experts/lr": 0.25,
    }  # fmt: skip
    timing = read_metrics(tmp_path / "timing.jsonl")[2]
    assert timing["throughput/tokens_per_s"] == pytest.approx(100 / timing["time/step_p50"])
    assert timing["throughput/mfu"] == pytest.approx(100 / timing["time/step_p50"] * 3e9 / 1e12)
    shown = sys.stderr.getvalue().split("\r")[-1]
    assert "experts:  75%" in shown and "loss 2.000, MFU " in shown and "round 2/2" in shown


def test_a_loss_that_is_not_finite_names_step_and_records(tmp_path, mesh, monkeypatch):
    own = watch(tmp_path / "metrics.jsonl", monkeypatch, silent=True)
    own.step(3, {"loss": put(np.float32("nan")), "load": put(np.ones(2, np.float32))})
    rule = r"step 3 \(step 3 of phase experts, records 3, 7\): experts/loss is nan; the run stops before this is saved"
    with pytest.raises(NonFiniteError, match=rule):
        own.flush()
    own.close()
    assert sys.stderr.getvalue() == ""


def test_figures_of_the_manifest_are_of_all_starts(tmp_path, mesh, monkeypatch):
    """Two starts, the second from step 2 of 4; then one whose earlier timings are gone."""
    path, now = tmp_path / "metrics.jsonl", [0.0]
    for module in (loop.time, metrics.time):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])

    def begun(resumed):
        phase = PhaseFigures(2, 100, 3e9, np.zeros(4), lambda step: np.array([step]))
        at = {0: ("router", 0), 1: ("experts", 0), 2: ("router", 1), 3: ("experts", 1)}.get
        log, pace = Metrics(path, resumed), Pace()
        phases = {"router": phase, "experts": phase}
        return Watch(log, pace, phases, at, 2, peak=None, window=2, silent=True), pace

    def steps(own, pace, ticks):
        for tick in ticks:
            with pace.waiting("compile"):
                now[0] += 50 if tick == ticks[0] else 0
            now[0] += 2 + tick
            own.step(tick, {"loss": put(np.float32(1)), "load": put(np.ones(2, np.float32))})
        own.flush()

    own, pace = begun(0)
    steps(own, pace, range(3))  # the last one is lost
    own.close()
    own, pace = begun(2)
    steps(own, pace, range(2, 4))
    assert own.speeds({"router": 60, "experts": 80}) == {
        "seconds": (50 + 2 + 3) + (50 + 4 + 5), "tokens_per_s": {"router": 60 / (2 + 4), "experts": 80 / (3 + 5)},
    }  # fmt: skip
    own.close()
    (tmp_path / "timing.jsonl").unlink()
    own, pace = begun(3)
    steps(own, pace, range(3, 4))
    assert own.speeds({"experts": 80}) == {"seconds": None, "tokens_per_s": {"experts": None}}
    own.close()


def test_profiler_traces_its_window(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(loop.jax.profiler, "start_trace", lambda folder: told.append("start"))
    monkeypatch.setattr(loop.jax.profiler, "stop_trace", lambda: told.append("stop"))
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda work: told.append(f"wait {work}"))
    for config, expected in (
        (ProfileConfig(), "0 1 2 3 4"),
        (ProfileConfig(steps=2, start=1), "0 start 1 2 wait 2 stop 3 4"),
        (ProfileConfig(steps=2, start=0), "start 0 1 wait 1 stop 2 3 4"),
        (ProfileConfig(steps=9, start=3), "0 1 2 start 3 4 stop"),
    ):
        profiler = Profiler(config, tmp_path)
        for step in range(5):
            told.append(str(step))
            profiler.step(step)
        profiler.close()
        assert " ".join(told) == expected
        told.clear()
    for fields in ({"steps": -1}, {"start": -1}):
        with pytest.raises(ConfigError, match="must not be negative"):
            ProfileConfig(**fields)


@pytest.mark.parametrize("count, folder", [(1, "trace"), (2, "trace/process1")])
def test_each_process_traces_into_a_folder_of_its_own(tmp_path, monkeypatch, count, folder):
    told = []
    monkeypatch.setattr(loop.jax, "process_count", lambda: count)
    monkeypatch.setattr(loop.jax, "process_index", lambda: count - 1)
    monkeypatch.setattr(loop.jax.profiler, "start_trace", told.append)
    Profiler(ProfileConfig(steps=1, start=0), tmp_path / "trace")
    assert told == [str(tmp_path / folder)]


def test_timer(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    timer, never = Timer(2), Timer(0)
    now[0] = 124
    assert not timer.due()
    now[0] = 126
    assert timer.due() and not never.due()
    assert not timer.due(), "said once"
    now[0] = 247
    assert timer.due()
    now[0] = 360
    timer.restart()
    now[0] = 368
    assert not timer.due()
