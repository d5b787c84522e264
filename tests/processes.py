"""Training runs as processes of their own: one or several on loopback, each with forced CPU devices."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

COMMAND = [sys.executable, "-c", "from readme_jax.cli import main; main()"]
ENV = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(
    *words: object, processes: int = 1, devices: int = 8, logs: Path, cache: str | None = None, **env: str
) -> list[subprocess.Popen]:
    """Start `readme-jax *words`, once a process; stdout and stderr of each go to a file `<logs>.<process>`, appended.

    cache: folder of compiled programs, which a process that is started again finds.
    """
    address, running = f"127.0.0.1:{free_port()}", []
    for process in range(processes):
        own = os.environ | ENV | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | env
        if cache:
            own |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if processes > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            own |= {"JAX_PROCESS_ID": str(process)}
        with open(f"{logs}.{process}", "a") as log:
            running.append(
                subprocess.Popen([*COMMAND, *map(str, words)], env=own, stdout=log, stderr=subprocess.STDOUT)
            )
    return running


def ended(running: list[subprocess.Popen], timeout: float = 300) -> list[int]:
    """Exit codes, once all have ended; those that do not are aborted, and their logs tell what each thread was at."""
    end = time.monotonic() + timeout
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0))
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
    return [process.wait() for process in running]


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model folder."""
    from readme_jax import hf

    reader = hf.Reader(folder)
    return {name: np.array(reader.get(name)) for name in reader.names()}
