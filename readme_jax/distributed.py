"""The processes of a run: how they start and end together, and how they agree. One process is the same with none.

Values that all must know go by way of process 0 (`on_main`, `everyone`); what may not wait for anything rides through
the devices one step late (`Agreement`).
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import peers
from readme_jax.config import UNEXPECTED, PeerError, ReadMeError, Stopped, exit_code, require
from readme_jax.peers import Peers, check_address
from readme_jax.sharding import AXES, P, from_callback

_line: Peers | None = None
_count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes of a run, one a host. With all defaults they are found from the environment; else there is one."""

    coordinator: str = ""
    """host:port of process 0, the same for all. Empty: JAX_COORDINATOR_ADDRESS, or what JAX finds under SLURM, Open
    MPI, GKE and on Cloud TPU VMs."""
    processes: int = 0
    """How many processes there are. 0: JAX_NUM_PROCESSES, or what JAX finds; 1: one, whatever the environment says."""
    process: int = -1
    """Number of this process, from 0. -1: JAX_PROCESS_ID, or what JAX finds."""
    start_timeout: int = 300
    """Seconds that processes wait for each other at the start."""
    timeout: int = 60
    """Seconds without a sign of life after which a process counts as gone and the others end (exit code 76): it is
    frozen or its host is lost. One that is killed is noticed at once. One whose main thread hangs while its other
    threads live goes on giving signs: that is not noticed."""

    def __post_init__(self):
        if self.coordinator:
            check_address(self.coordinator, "hosts.coordinator")
        require(self.processes >= 0, f"hosts.processes={self.processes} must not be negative")
        require(self.process >= -1, f"hosts.process={self.process} must be 0 or more, or -1 for what JAX finds")
        inside = self.processes == 0 or self.process < self.processes
        require(inside, f"hosts.process={self.process} must be below hosts.processes={self.processes}")
        require(self.start_timeout >= 1, f"hosts.start_timeout={self.start_timeout} must be at least 1")
        require(self.timeout >= 5, f"hosts.timeout={self.timeout} must be at least 5")


def arguments(config: HostsConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What jax.distributed.initialize is told: {} when JAX is to find everything, None for a single process."""
    if config.processes == 1:
        return None
    number = {"processes": config.processes or None, "process": config.process if config.process >= 0 else None}
    for key, name in (("processes", "JAX_NUM_PROCESSES"), ("process", "JAX_PROCESS_ID")):
        if number[key] is None and name in environ:
            require(environ[name].isdigit(), f"{name}={environ[name]!r} must be a whole number")
            number[key] = int(environ[name])
    address = config.coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    said = {"coordinator_address": address, "num_processes": number["processes"], "process_id": number["process"]}
    given = {key: value for key, value in said.items() if value is not None}
    if given:
        found = _launcher(environ)
        names = ("hosts.coordinator", "hosts.processes", "hosts.process")
        missing = [name for name, key in zip(names, said) if key not in given]
        require(
            bool(found) or not missing,
            f"{', '.join(missing)}: needed too, where JAX does not find the processes itself",
        )
        return given if given.get("num_processes") != 1 else None
    return {} if _launcher(environ) else None


def _launcher(environ: Mapping[str, str]) -> str:
    """What JAX's own detection of processes is to be asked for: a launcher with several tasks, or a Cloud TPU VM."""
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
        return "slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 and "OMPI_MCA_orte_hnp_uri" in environ:
        return "ompi"
    if "JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ:
        if "TPU_WORKER_HOSTNAMES" not in environ and importlib.util.find_spec("kubernetes") is not None:
            return "k8s"
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return ""
    # What a Cloud TPU VM has beside libtpu. JAX then asks environment or metadata how many hosts the slice has.
    return "tpu" if Path("/dev/accel0").exists() or Path("/dev/vfio").exists() else ""


# ---- start and end ----------------------------------------------------------------------------


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Be one of the run's processes for the block; must come before anything that touches a device.

    Every process gets through the block, or none: what one raises ends the others too. With several processes an
    exception is shown here and ends the process (`config.exit_code`), since an orderly exit would wait for peers
    that never come; `Stopped`, which all raise together, passes.
    """
    told = arguments(config, os.environ)
    if told is None:
        yield
        return
    _start(config, told)
    if _line is None:
        yield
        return
    try:
        yield
    except Stopped:
        _leave()
        raise
    except BaseException as error:
        code = exit_code(error)
        if code == UNEXPECTED:
            # Perhaps a collective failed since a peer is lost: by then the line has found out and said which one.
            _line.wait_for_end(config.timeout + 5.0)
            if not isinstance(error, ReadMeError | OSError):
                traceback.print_exc()
        text = " ".join(f"{error}".split()) or type(error).__name__
        print(f"error: {text}" if _line.process == 0 else f"error: process {_line.process}: {text}", file=sys.stderr)
        _line.fail(text[:500], code)
    _leave()


def _start(config: HostsConfig, told: dict[str, Any]) -> None:
    global _line, _count
    # JAX would take SIGTERM for itself; here `Stop` and `Agreement` do what its preemption service does.
    jax.config.update("jax_enable_preemption_service", False)
    up = threading.Event()
    threading.Thread(target=_guard_start, args=(up, config, told), daemon=True).start()
    try:
        jax.distributed.initialize(
            **told,
            initialization_timeout=config.start_timeout,
            # long after the line above has had its say, whenever JAX beat last
            heartbeat_timeout_seconds=2 * config.timeout + 20,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        up.set()
        if not told and _launcher(os.environ) == "tpu" and isinstance(error, ValueError):
            return  # a TPU outside of Google's clouds: nothing to join
        raise PeerError(f"the processes cannot start together: {' '.join(str(error).split())[:300]}") from None
    up.set()
    _count = jax.process_count()
    if _count == 1:
        return
    from jax.experimental import multihost_utils

    process, known = jax.process_index(), ()
    if "coordinator_address" in told:
        known = (check_address(told["coordinator_address"], "coordinator")[0],)
    server, card = peers.listen() if process == 0 else (None, {})
    text = np.frombuffer(json.dumps(card).ljust(2048).encode(), np.uint8)
    card = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))))
    try:
        if server is not None:
            _line = peers.accept(server, card, _count, config.timeout)
        else:
            _line = peers.connect(card, process, config.timeout, known)
    except PeerError as error:
        peers.say(f"error: {error}")
        os._exit(error.exit_code)  # an orderly exit would wait for those that are not there


def _guard_start(up: threading.Event, config: HostsConfig, told: dict[str, Any]) -> None:
    # JAX aborts with a stack trace when processes are missing: say it in one line, just before.
    if not up.wait(max(config.start_timeout - 1.0, 0.5)):
        who = f"process {told.get('process_id', '?')} of {told.get('num_processes', '?')}"
        where = f" at {told['coordinator_address']}" if "coordinator_address" in told else ""
        peers.say(f"error: {who}: not all processes came{where} within {config.start_timeout} s")
        os._exit(PeerError.exit_code)


def _leave() -> None:
    global _line, _count
    barrier()
    assert _line is not None
    _line.close()
    jax.distributed.shutdown()
    _line, _count = None, 1


def rank() -> int:
    """Number of this process, 0 without others."""
    return 0 if _line is None else _line.process


def count() -> int:
    """Number of processes."""
    return 1 if _line is None else _count


def is_main() -> bool:
    """True on process 0: it alone writes logs, results and what a person reads."""
    return rank() == 0


def show(text: str) -> None:
    """Print a line, once for all processes."""
    if is_main():
        print(text, flush=True)


# ---- agreeing ---------------------------------------------------------------------------------


def on_main(work: Callable[[], Any]) -> Any:
    """Run `work` on process 0 while the others wait: all return its value (plain JSON) or raise its ReadMeError."""
    if _line is None:
        return work()
    if _line.process > 0:
        return _line.hear(0)
    try:
        value = work()
    except ReadMeError as error:
        _line.tell(["error", type(error).__name__, str(error)])
        raise
    _line.tell(["value", value])
    return value


def everyone(value: Any) -> list[Any]:
    """The values (plain JSON) of all processes, by number. Waits for all of them."""
    if _line is None:
        return [value]
    if _line.process > 0:
        _line.tell(["value", value])
        return _line.hear(0)
    values = [value, *(_line.hear(other) for other in range(1, _count))]
    _line.tell(["value", values])
    return values


def barrier() -> None:
    """Wait until every process is here. What one of them wrote to shared files before it, the others then read."""
    everyone(None)


def aside(value: Any) -> list[Any] | None:
    """Hand a value (plain JSON) to process 0 from a thread beside the main one: it does not meet what those say.

    Process 0 waits for those of all processes and gets them by number; the others get None, at once. One thread of a
    process at a time.
    """
    if _line is None:
        return [value]
    if _line.process > 0:
        _line.tell(["aside", value])
        return None
    return [value, *(_line.hear_aside(other) for other in range(1, _count))]


class Agreement:
    """The largest wish of any process, learnt by all at the same step and without waiting for the device.

    Each step hands a number to a small program that takes the maximum over the devices; its result is read a step
    later, when the device has long passed it. With one process a wish is known at once.
    """

    def __init__(self):
        mesh = jax.sharding.get_mesh()
        self._place = jax.NamedSharding(mesh, P(AXES)) if mesh.is_multi_process else None
        self._shape, self._last = (mesh.size,), None
        self._largest = jax.jit(jnp.max)

    def step(self, wish: int) -> int:
        """Hand in this process's wish after a step; gives the largest wish after the step before."""
        if self._place is None:
            return wish
        mine_N = from_callback(self._shape, self._place, lambda index: np.full(1, wish, np.int32))
        last, self._last = self._last, self._largest(mine_N)
        return 0 if last is None else int(jax.device_get(last))


class Stop:
    """`asked` names the signal once SIGTERM or SIGINT has come. The one after it does what it always did."""

    def __init__(self):
        self.asked = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # nowhere else may signals be caught
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def leave(self) -> None:
        """Between pieces of work, where nothing is lost: Stopped when any process was asked. All come here together."""
        asked = [why for why in everyone(self.asked) if why]
        if asked:
            raise Stopped(f"stopped by {asked[0]}; nothing is lost")

    def _note(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number).name
        self._restore()
        peers.say(f"{self.asked}: the run saves itself at the next step and ends; a second signal ends it at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def __exit__(self, *_: Any) -> None:
        self._restore()
