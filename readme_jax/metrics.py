"""Metrics of a run: one JSON line a step, optional TensorBoard, a progress bar, timings and peak memory."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from readme_jax import artifacts
from readme_jax.config import ConfigError, ReadMeError


class NonFiniteError(ReadMeError):
    """A loss or gradient that is not a number: the run stops and says where."""


class Metrics:
    """Append-only JSONL log keyed by a step number; on resume the lines past the restored step are dropped."""

    def __init__(self, path: Path, resume_at: int = 0, tensorboard: Path | None = None):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line a kill cut short
                    continue
                if entry["step"] < resume_at:
                    kept.append(line)
        artifacts.write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)
        self._board = None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ConfigError("tensorboard=true needs the extra: pip install 'readme-jax[tensorboard]'") from None
            self._board = SummaryWriter(str(tensorboard))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line; NonFiniteError names the first value that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"step {step}: {name} is {value}; the run stops before this is saved")
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """All lines of a metrics file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def progress(total: int, name: str, unit: str = "tok", initial: int = 0) -> tqdm:
    """A tqdm bar with a rate: live on a terminal, a line every 30 s elsewhere."""
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
    )


def layers(items: Iterable[int], name: str) -> Iterator[int]:
    """The items one by one under a progress bar that counts layers."""
    items = list(items)
    with progress(len(items), name, "layer") as bar:
        for item in items:
            yield item
            bar.update()


def peak_memory_gb() -> float:
    """Peak resident memory since `reset_peak_memory` (Linux) or the start of this process, GB (10^9 bytes)."""
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
