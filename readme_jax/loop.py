"""Pieces of the training loop: batches made ahead on a thread, what is logged and shown of each step, a trace."""

import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from readme_jax.config import require
from readme_jax.data import Batches
from readme_jax.metrics import Metrics, Pace, Stopwatch, progress, routing_spread
from readme_jax.sharding import P, put_parts, spec

MICRO = P(None, *spec("batch", "seq"))  # of [A, B, T]
DEPTH = 2  # batches made ahead


def place_batch(batches: Batches, step: int, cache: Any = None) -> dict[str, jax.Array]:
    """ids and segments int32 [A, B, T] of a step on the current mesh; a process reads the records of its devices only.

    cache: a RecordCache, looked up for the same records: adds its fields, [A, B, ...].
    """
    A, B = batches.shape
    rows = functools.cache(lambda start, stop: batches.rows(step, start, stop))
    said = functools.cache(lambda start, stop: cache[rows(start, stop)["index"]])

    def part(read: Callable, key: str) -> Callable:
        return lambda index: read(index[1].start, index[1].stop)[key][index[0]]

    shape = (A, B, batches.seq)
    placed = {key: put_parts(shape, np.int32, part(rows, key), MICRO, where=key) for key in ("ids", "segments")}
    for key, (own, dtype) in cache.fields.items() if cache is not None else ():
        placed[key] = put_parts((A, B, *own), dtype, part(said, key), MICRO, where=key)
    return placed


class Ahead:
    """make(tick) for ticks below `stop`, asked for in order; the next ones are made on a thread meanwhile.

    What `make` raises is raised where its result is asked for. `pace` is told how long the loop had to wait.
    """

    def __init__(self, make: Callable[[int], Any], stop: int, pace: Pace):
        self._make, self._stop, self._pace = make, stop, pace
        self._mesh = jax.sharding.get_mesh()  # it belongs to a thread
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "batches")
        self._made: dict[int, concurrent.futures.Future] = {}

    def __call__(self, tick: int) -> Any:
        for number in range(tick, min(tick + DEPTH + 1, self._stop)):
            if number not in self._made:
                self._made[number] = self._pool.submit(self._one, number)
        with self._pace.waiting("data"):
            return self._made.pop(tick).result()

    def _one(self, tick: int) -> Any:
        with jax.set_mesh(self._mesh):
            return self._make(tick)

    def close(self) -> None:
        """End the thread; what nobody asked for is dropped."""
        self._pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A window of steps traced by the JAX profiler (TensorBoard, XProf or Perfetto show it)."""

    steps: int = 0
    """Steps to trace; 0: none."""
    start: int = 5
    """Steps after the start (or resumption) of this process before the first traced one."""

    def __post_init__(self):
        require(self.steps >= 0, f"profile.steps={self.steps} must not be negative")
        require(self.start >= 0, f"profile.start={self.start} must not be negative")


class Profiler:
    """Traces the steps of a `ProfileConfig` into `folder`, from construction on where the first one is the first of
    all; `step` is told after each. Of several processes each has a folder of its own in it, `process<number>`."""

    def __init__(self, config: ProfileConfig, folder: Path):
        self._first, self._last, self._count, self._on = config.start, config.start + config.steps, 0, False
        several = jax.process_count() > 1
        self._folder = folder / f"process{jax.process_index()}" if several else folder  # hosts may have one name
        self._begin()

    def step(self, work: Any) -> None:
        """Start or stop tracing after a step that was enqueued and gives `work`: the last one is waited for."""
        self._count += 1
        if self._on and self._count == self._last:
            jax.block_until_ready(work)
            self.close()
        self._begin()

    def _begin(self) -> None:
        if self._count == self._first < self._last:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def close(self) -> None:
        """End a trace that is still on. What the device has not done by then is not in it."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


class Timer:
    """Whether `minutes` have passed since the last restart, said once; with 0 they never have."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self._start = time.perf_counter()

    def due(self) -> bool:
        """Whether the time is up. It then begins anew: what is asked for may be done a step later."""
        up = bool(self._seconds) and time.perf_counter() - self._start > self._seconds
        if up:
            self.restart()
        return up


@dataclasses.dataclass(frozen=True)
class PhaseFigures:
    """What `Watch` knows of a phase. steps: of a round; tokens: of one step; flops: of one token; rates: learning rate
    by step; records: step -> record numbers of its batch."""

    steps: int
    tokens: int
    flops: float
    rates: np.ndarray
    records: Callable[[int], np.ndarray]


class Watch:
    """Logs every step one step late, so that the loop never waits for the device, and keeps the progress bars.
    at: step of the run -> (phase, step within it). peak: FLOP/s of all devices together, None when unknown. window:
    expert steps of `score`. silent: no bars, for processes that nobody reads.
    """

    def __init__(
        self,
        metrics: Metrics,
        pace: Pace,
        phases: dict[str, PhaseFigures],
        at: Callable[[int], tuple[str, int]],
        rounds: int,
        *,
        peak: float | None,
        window: int,
        silent: bool,
    ):
        self._metrics, self._pace, self._phases, self._at, self._rounds = metrics, pace, phases, at, rounds
        self._peak, self._silent = peak, silent
        self._losses = collections.deque(metrics.past("experts/loss"), maxlen=window)
        self._pending: tuple[int, dict[str, Any], dict[str, float]] | None = None
        self._bars: dict[str, Any] = {}
        self._clock, self._seconds = Stopwatch(), dict.fromkeys(phases, 0.0)
        for line in metrics.timings:
            self._count(line["step"], line)

    def step(self, tick: int, values: dict[str, Any]) -> None:
        """Take what a step that was just enqueued will give, and log the one before."""
        self.flush()
        name = self._at(tick)[0]
        timing = self._pace.lap(name)
        self._count(tick, timing)
        self._pending = (tick, values, timing)

    def _count(self, tick: int, timing: dict[str, float]) -> None:
        compiling = timing.get("time/compile", 0.0)  # older lines have none
        self._seconds[self._at(tick)[0]] += timing["time/step"] - compiling

    def flush(self) -> None:
        """Log the last step: waits for the device. Must come before anything is saved."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._log(*pending)

    def speeds(self, tokens: dict[str, int]) -> dict[str, Any]:
        """For the manifest, of the steps that led here, over all starts of the run (what was computed and lost to a
        kill is not in it): `seconds`, with all they waited for, and `tokens_per_s` of each phase's tokens, compiling
        left out. None where timings of earlier starts are missing."""
        known = len(self._metrics.timings) == self._metrics.resumed
        seconds = self._clock.seconds + sum(line["time/step"] for line in self._metrics.timings)
        rates = {n: count / self._seconds[n] if known and self._seconds[n] else None for n, count in tokens.items()}
        return {"seconds": seconds if known else None, "tokens_per_s": rates}

    def score(self) -> float | None:
        """Mean expert loss of the last steps, None before the first."""
        return float(np.mean(self._losses)) if self._losses else None

    def _log(self, tick: int, values: dict[str, Any], timing: dict[str, float]) -> None:
        name, number = self._at(tick)
        phase = self._phases[name]
        with self._pace.waiting("device"):
            host = jax.device_get(values)
        host |= routing_spread(host.pop("load"))
        named = {f"{name}/{key}": float(value) for key, value in host.items()}
        named[f"{name}/lr"] = float(phase.rates[number])
        speed = phase.tokens / timing["time/step_p50"]
        timing = timing | {"throughput/tokens_per_s": speed}
        if self._peak is not None:
            timing["throughput/mfu"] = speed * phase.flops / self._peak
        self._metrics.log(tick, named, timing, lambda: self._where(tick))
        if name == "experts":
            self._losses.append(named["experts/loss"])
        self._show(name, number, named[f"{name}/loss"], timing)

    def _where(self, tick: int) -> str:
        name, number = self._at(tick)
        numbers = np.unique(self._phases[name].records(number)).tolist()
        shown = ", ".join(map(str, numbers[:32])) + (", ..." if len(numbers) > 32 else "")
        return f"step {number} of phase {name}, records {shown}"

    def _show(self, name: str, number: int, loss: float, timing: dict[str, float]) -> None:
        phase = self._phases[name]
        if name not in self._bars:
            whole = phase.steps * self._rounds * phase.tokens
            self._bars[name] = progress(whole, name, initial=number * phase.tokens, silent=self._silent)
        bar, speed = self._bars[name], timing["throughput/tokens_per_s"]
        busy = f"MFU {timing['throughput/mfu']:.1%}" if self._peak else f"{speed * phase.flops / 1e9:.0f} GFLOP/s"
        bar.set_postfix_str(f"loss {loss:.3f}, {busy}, round {number // phase.steps + 1}/{self._rounds}", refresh=False)
        bar.update(phase.tokens)

    def close(self) -> None:
        """End the bars and the log."""
        for bar in self._bars.values():
            bar.close()
        self._metrics.close()


whole = jax.jit(lambda a: jax.reshard(a, P()))  # what every process is to know
