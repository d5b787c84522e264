"""Programs of a runner, compiled before the first request; then nothing is traced or compiled any more."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

COMPILED = "/jax/core/compile/backend_compile_duration"


class Job(NamedTuple):
    """A program to compile: its key, the function, arguments of its shapes, which of them are donated, and where its
    results lie if XLA is not to choose."""

    key: tuple
    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()
    out: Any = None


class Programs(dict[tuple, Any]):
    """Compiled programs by key. compiles: what JAX has compiled in this process since `compile`, whoever asked."""

    def __init__(self):
        super().__init__()
        self.compiles = 0
        self._heard: Callable | None = None

    def compile(self, jobs: Sequence[Job], progress: bool) -> None:
        """Compile them on the current mesh, with a bar on a terminal. JAX's persistent cache, where one is configured,
        saves the work."""
        for job in tqdm(jobs, "compile", unit="program", disable=not progress or None):
            function = jax.jit(job.function, donate_argnums=job.donated, out_shardings=job.out)
            self[job.key] = function.lower(*job.arguments).compile()
        whose = weakref.ref(self)  # JAX keeps the listener: an engine that is dropped must not stay with it

        def heard(event: str, duration_secs: float, **_: str | int) -> None:
            if event == COMPILED and (programs := whose()) is not None:
                programs.compiles += 1

        self._heard = heard
        jax.monitoring.register_event_duration_secs_listener(heard)

    def close(self) -> None:
        """Hear of nothing any more."""
        if self._heard is not None:
            with contextlib.suppress(AssertionError, ValueError):  # somebody has cleared all listeners
                jax.monitoring.unregister_event_duration_listener(self._heard)
            self._heard = None
