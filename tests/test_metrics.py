"""Metrics on disk, the bar, timings and memory."""

import io
import struct
import sys
import time

import numpy as np
import pytest

from readme_jax import accelerators, metrics
from readme_jax.config import ConfigError
from readme_jax.metrics import (
    Metrics,
    NonFiniteError,
    peak_memory,
    peak_memory_gb,
    progress,
    read_metrics,
    reset_peak_memory,
)


def test_a_line_a_step_and_nothing_twice_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Metrics(path)
    for step in range(5):
        log.log(step, {"loss": step / 2})
    # no close: what was logged is on disk at once; the last line is cut by the kill
    assert read_metrics(path) == [{"step": s, "loss": s / 2} for s in range(5)]
    path.write_text(path.read_text()[:-4])
    with open(path, "ab") as file:  # what a disk may make of a line
        file.write(b'\n\xff\xfe\n[]\n{"loss": 1}\n"step"\n')
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


def test_it_says_where_and_nothing_of_it_is_written(tmp_path):
    log = Metrics(tmp_path / "m.jsonl")
    rule = r"step 7 \(step 3 of phase experts, records 1, 5\): loss is nan; the run stops"
    with pytest.raises(NonFiniteError, match=rule):
        log.log(7, {"loss": float("nan")}, {"time/step": 1.0}, lambda: "step 3 of phase experts, records 1, 5")
    log.close()
    assert read_metrics(tmp_path / "timing.jsonl") == []


def test_what_is_measured_lies_apart(tmp_path):
    log = Metrics(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.log(step, {"loss": 1.0 * step}, {"time/step": 0.5})
    log.close()
    log = Metrics(tmp_path / "metrics.jsonl", resume_at=2)
    assert log.past("loss") == [0.0, 1.0] and log.past("other") == []
    log.close()
    assert read_metrics(tmp_path / "timing.jsonl") == [{"step": s, "time/step": 0.5} for s in (0, 1)]
    silent = Metrics(None)
    silent.log(0, {"loss": 1.0}, {"time/step": 1.0})
    silent.close()


def test_wandb_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"readme-jax\[wandb\]"):
        Metrics(tmp_path / "m.jsonl", wandb={"project": "p", "dir": str(tmp_path)})

    class Run:
        logged, finish = [], lambda self: self.logged.append("finished")

        def log(self, values, step):
            self.logged.append((values, step))

    library = type(sys)("wandb")
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(library, "init", lambda **said: Run.logged.append(said) or Run(), raising=False)
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = Metrics(tmp_path / folder / "m.jsonl", wandb={"project": "p", "dir": str(tmp_path / folder)})
        log.log(4, {"loss": 0.5}, {"time/step": 2.0})
        log.close()
    assert Run.logged[1:3] == [({"loss": 0.5, "time/step": 2.0}, 4), "finished"]
    first, again, other = Run.logged[::3]
    assert first | {"id": ""} == {"project": "p", "dir": str(tmp_path / "a"), "id": "", "resume": "allow"}
    assert again == first and len(first["id"]) == 32 and other["id"] != first["id"], "a folder is one run"


def test_spread_of_the_load():
    assert metrics.routing_spread(np.array([0.5, 0.5, 0, 0])) == {"load_max_over_mean": 2.0, "unused_experts": 0.5}
    assert metrics.routing_spread(np.array([1.0])) == {"load_max_over_mean": 1.0, "unused_experts": 0.0}


def test_pace_divides_the_time_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    def step(data, device, host, save=0.0):
        for why, seconds in (("data", data), ("device", device), ("save", save)):
            with pace.waiting(why):
                spend(seconds)
        spend(host)
        return pace.lap("experts")

    pace = metrics.Pace()
    first = step(data=9.0, device=90.0, host=1.0)
    assert first["time/step"] == 100 and first["time/host_share"] == pytest.approx(0.01)
    step(data=1.0, device=7.0, host=2.0)
    figures = step(data=0.0, device=9.0, host=1.0, save=5.0)
    assert figures["time/step"] == 15 and figures["time/save"] == 5
    assert figures["time/step_p50"] == 10, "the first, which compiles, is left out, and so is the time of a save"
    assert figures["time/data_wait_share"] == pytest.approx(1 / 20)
    assert figures["time/host_share"] == pytest.approx(3 / 20)
    with pace.calling():
        spend(4.0)
    assert pace.lap("experts")["time/host_share"] == pytest.approx(7 / 24), "starting a program is the host's work"
    with pace.waiting("compile"):
        spend(30.0)
        with pace.waiting("device"):
            spend(6.0)
    with pace.waiting("device"):
        spend(10.0)
    figures = pace.lap("experts")
    assert figures["time/step"] == 46 and figures["time/compile"] == 36, "all of it is the outer one's"
    assert figures["time/step_p50"] == 10 and figures["time/step_p95"] <= 10 and figures["time/host_share"] < 7 / 24
    pace = metrics.Pace(inline=True)
    with pace.calling():
        spend(4.0)
    assert pace.lap("experts")["time/host_share"] == 0, "on CPU the program runs in the call"


@pytest.mark.parametrize(
    "kind, peak",
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v4 lite", 138e12), ("cpu", None)]
    + [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)],
)
def test_peaks_by_what_jax_calls_a_device(kind, peak):
    assert accelerators.peak_flops(kind) == peak


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"readme-jax\[tensorboard\]"):
        Metrics(tmp_path / "m.jsonl", tensorboard=tmp_path / "events")

    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = folder
            written.append(purge_step)

        def add_scalar(self, *entry):
            written.append((self.folder, *entry))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    monkeypatch.setattr(sys.modules["tensorboardX"], "SummaryWriter", Writer, raising=False)
    log = Metrics(tmp_path / "m.jsonl", 2, tensorboard=tmp_path / "events")
    log.log(2, {"loss": 0.5})
    log.close()
    assert written == [2, (str(tmp_path / "events"), "loss", 0.5, 2), "closed"]


def events(folder):
    """{tag: {step: [value]}} that TensorBoard shows of a folder: a start of a writer hides what lies at its step and
    after it (`EventAccumulator` of TensorBoard does so from file version 2 on)."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # records: length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = {tag: {s: v for s, v in own.items() if s < event.step} for tag, own in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, {}).setdefault(event.step, []).append(value.simple_value)
    return shown


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    """Against the real writer, two starts: the second goes on from step 3 of 5."""
    pytest.importorskip("tensorboardX")
    for resumed, steps, loss in ((0, range(5), 1.0), (3, range(3, 6), 2.0)):
        log = Metrics(tmp_path / "m.jsonl", resumed, tensorboard=tmp_path / "events")
        for step in steps:
            log.log(step, {"loss": loss})
        log.close()
        for path in (tmp_path / "events").glob("events.*"):  # named after the second: another one for each start
            path.rename(path.with_name(f"{resumed}.{path.name}"))
    assert events(tmp_path / "events") == {"loss": {s: [1.0 if s < 3 else 2.0] for s in range(6)}}


def test_bar_starts_where_a_resumed_stage_is(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(100, "train", initial=40) as bar:
        bar.update(20)
        assert (bar.n, bar.total) == (60, 100)
        assert bar.mininterval == 30.0, "a line every 30 s where there is no terminal"
    assert "train" in sys.stderr.getvalue() and "60.0/100" in sys.stderr.getvalue()


def test_peak_memory_is_of_the_device_where_it_is_counted(monkeypatch):
    host = peak_memory()
    assert host["peak_memory_of"] == "host" and 0.05 < host["peak_memory_gb"] <= peak_memory_gb()

    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    stats = [{"bytes_in_use": 9}, {"peak_bytes_in_use": 3_000_000_000, "bytes_in_use": 5}, {"peak_bytes_in_use": 7}]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device(own) for own in [None, *stats]])
    assert peak_memory() == {"peak_memory_gb": 3.0, "peak_memory_of": "device"}


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
