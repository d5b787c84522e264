"""Metrics of a run: JSON lines, optional TensorBoard and wandb, a progress bar, the pace of steps, peak memory."""

import collections
import contextlib
import importlib
import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from readme_jax import artifacts
from readme_jax.config import ConfigError, ReadMeError


class NonFiniteError(ReadMeError):
    """A loss or gradient that is not a number: the run stops and says where."""


class Metrics:
    """Append-only JSON lines keyed by a step number; on resume the lines past the restored step are dropped.

    `path` holds what a run computes, the same however often it was interrupted; `timing.jsonl` beside it what was
    measured. path None writes nothing: for the processes that do not log. TensorBoard hides the events that are
    dropped; wandb goes on with the same run, and ignores the steps it has already.
    """

    def __init__(
        self,
        path: Path | None,
        resume_at: int = 0,
        tensorboard: Path | None = None,
        wandb: dict[str, Any] | None = None,
    ):
        """tensorboard: folder for events. wandb: arguments of wandb.init; the run's id is kept below its `dir`.
        ConfigError where their extra is missing."""
        self._files, self._board, self._wandb = [], None, None
        self._kept: list[dict] = []
        self.resumed = resume_at
        self.timings: list[dict] = []  # lines of timing.jsonl from before that step
        if path is None:
            return
        timing = path.with_name("timing.jsonl")
        self._kept = _drop(path, resume_at)
        self.timings = _drop(timing, resume_at)
        self._files = [open(file, "a", buffering=1) for file in (path, timing)]
        if tensorboard is not None:
            self._board = extra("tensorboard").SummaryWriter(str(tensorboard), purge_step=resume_at)
        if wandb is not None:
            library = extra("wandb")
            self._wandb = library.init(**wandb, id=_run_id(Path(wandb["dir"]) / "wandb" / "run-id"), resume="allow")

    def past(self, name: str) -> list[float]:
        """Values of the steps before the one the run was resumed at."""
        return [line[name] for line in self._kept if name in line]

    def log(
        self,
        step: int,
        values: dict[str, float],
        timing: dict[str, float] | None = None,
        where: Callable[[], str] | None = None,
    ) -> None:
        """Write a line. NonFiniteError names the first of `values` that is not finite, and `where()` it happened."""
        for name, value in values.items():
            if not math.isfinite(value):
                place = f" ({where()})" if where else ""
                advice = "the same config comes to it again: try a lower lr or clip, with another out"
                raise NonFiniteError(
                    f"step {step}{place}: {name} is {value}; the run stops before this is saved; {advice}"
                )
        for file, entry in zip(self._files, (values, timing)):
            if entry:
                file.write(json.dumps({"step": step, **entry}) + "\n")
        everything = {**values, **(timing or {})}
        if self._board is not None:
            for name, value in everything.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(everything, step=step)

    def close(self) -> None:
        """Flush and close."""
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def extra(name: str) -> Any:
    """The library of the extra `tensorboard` or `wandb`; ConfigError where it is missing."""
    try:
        return importlib.import_module({"tensorboard": "tensorboardX", "wandb": "wandb"}[name])
    except ImportError:
        raise ConfigError(f"{name} needs the extra: pip install 'readme-jax[{name}]'") from None


def _run_id(path: Path) -> str:
    """The id in a file, made at the first start."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(path, uuid.uuid4().hex)
    return path.read_text()


def _drop(path: Path, resume_at: int) -> list[dict]:
    """Rewrite a file of lines without those from `resume_at` on, and without one that a kill cut short or that is none
    of ours."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            entry = json.loads(line)
            if entry["step"] < resume_at:
                kept.append(entry)
    artifacts.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept


def read_metrics(path: Path) -> list[dict]:
    """All lines of a metrics file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def routing_spread(load_E: np.ndarray) -> dict[str, float]:
    """Of each expert's share of the tokens: the largest over the mean, and the part of the experts with none."""
    load_E = np.asarray(load_E, np.float64)
    return {
        "load_max_over_mean": float(load_E.max() * len(load_E) / max(load_E.sum(), 1e-30)),
        "unused_experts": float((load_E == 0).mean()),
    }


class Pace:
    """Where the wall time of a loop goes: waiting for data, for the device, saving, compiling; the rest is host work.

    `lap` closes a step and gives its figures: seconds, shares and percentiles over the last `window` steps of the same
    kind, without what was saved and compiled meanwhile. The first of a kind is left out of them: no step of its kind is
    waited for in it. inline: a program may run inside its call (CPU), so that calls count as device; the host's own
    part of a call, about half a millisecond, is then counted there too.
    """

    def __init__(self, window: int = 100, inline: bool = False):
        self._inline = inline
        self._start, self._waited = time.perf_counter(), collections.defaultdict(float)
        self._laps: dict[str, collections.deque] = {}
        self._window, self._within = window, False

    @contextlib.contextmanager
    def waiting(self, why: str) -> Iterator[None]:
        """Time of the block counts as waiting for `data`, `device`, `save` or `compile`; of blocks in a block, as the
        outer one's."""
        start, within, self._within = time.perf_counter(), self._within, True
        try:
            yield
        finally:
            self._within = within
            if not within:
                self._waited[why] += time.perf_counter() - start

    def calling(self) -> contextlib.AbstractContextManager[None]:
        """For a block that starts programs of the device."""
        return self.waiting("device") if self._inline else contextlib.nullcontext()

    def lap(self, kind: str) -> dict[str, float]:
        """Seconds of the step that ends here, and the shares of the last steps of its kind."""
        now, wait = time.perf_counter(), self._waited
        seconds, self._start, self._waited = now - self._start, now, collections.defaultdict(float)
        lap = (seconds - wait["save"] - wait["compile"], wait["data"], wait["device"])
        first = kind not in self._laps
        laps = self._laps.setdefault(kind, collections.deque(maxlen=self._window))
        if not first:
            laps.append(lap)
        step_N, data_N, device_N = np.array(laps or [lap]).T
        total = max(step_N.sum(), 1e-9)
        return {
            "time/step": seconds,
            "time/save": wait["save"],
            "time/compile": wait["compile"],
            "time/step_p50": float(np.percentile(step_N, 50)),
            "time/step_p95": float(np.percentile(step_N, 95)),
            "time/data_wait_share": float(data_N.sum() / total),
            "time/host_share": float((step_N - data_N - device_N).sum() / total),
        }


def progress(total: int, name: str, unit: str = "tok", initial: int = 0, silent: bool = False) -> tqdm:
    """A tqdm bar with a rate: live on a terminal, a line every 30 s elsewhere, nothing when `silent`."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        unit_scale=True,
        initial=initial,
        mininterval=0.2 if live else 30.0,
        dynamic_ncols=live,
        ascii=not live,
        disable=silent,
    )


def say(text: str) -> None:
    """A line on stderr, above the bars."""
    tqdm.write(text, file=sys.stderr)


def layers(items: Iterable[int], name: str) -> Iterator[int]:
    """The items one by one under a progress bar that counts layers."""
    items = list(items)
    with progress(len(items), name, "layer") as bar:
        for item in items:
            yield item
            bar.update()


def peak_memory() -> dict[str, Any]:
    """`peak_memory_gb`, GB (10^9 bytes), and `peak_memory_of`, what it is of.

    `device`: bytes in use at their peak since the start of this process, of its device with the most, where the backend
    counts them (GPU, TPU). Else `host`: `peak_memory_gb()`.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [own["peak_bytes_in_use"] for own in stats if "peak_bytes_in_use" in own]
    if peaks:
        return {"peak_memory_gb": max(peaks) / 1e9, "peak_memory_of": "device"}
    return {"peak_memory_gb": peak_memory_gb(), "peak_memory_of": "host"}


def peak_memory_gb() -> float:
    """Peak resident memory of the host process since `reset_peak_memory` (Linux) or its start, GB (10^9 bytes)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def reset_peak_memory() -> None:
    """Start the count of `peak_memory_gb` anew where the system can (Linux); elsewhere it goes on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Seconds since construction."""

    def __init__(self):
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed seconds."""
        return time.perf_counter() - self._start
