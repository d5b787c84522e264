"""Expert pages from host to device: a thread gathers their rows into staging buffers and sends them ahead of their use.

Loads are sent in the order in which they will be asked for (program order: step by step, layer by layer), which is the
order of their deadlines. The engine takes each one just before the call that writes it into its slot, and makes that
call after the last call that reads the slot's old page: the order of the program is the order on the device, so nothing
is overwritten early, however far ahead the rows were sent.
"""

import collections
import dataclasses
import threading
import time
from typing import NamedTuple

import jax
import numpy as np

from readme_jax.config import require

ALIGNMENT = 64  # bytes


class Sent(NamedTuple):
    """A transfer: when it began and was on the device, in seconds of `time.perf_counter`, and its bytes."""

    start: float
    end: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class HostRows:
    """FFN weights of all layers in host memory, and the channel that each row of each expert page holds.

    weights: arrays [L, F, D] of one dtype (gate, up, down), which may be memory-mapped; read only. order_LR: int32
    channel of every row, -1 for rows of padding; page p of a layer is rows p * page .. (p + 1) * page - 1.
    """

    weights: tuple[np.ndarray, ...]
    order_LR: np.ndarray
    page: int

    @property
    def pages(self) -> int:
        """Pages of a layer."""
        return self.order_LR.shape[1] // self.page

    @property
    def block(self) -> tuple[int, int]:
        """Rows and width of a page: those of every weight, one after the other."""
        return self.page * len(self.weights), self.weights[0].shape[2]

    @property
    def dtype(self) -> np.dtype:
        """Of the weights."""
        return self.weights[0].dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        rows, width = self.block
        return rows * width * self.dtype.itemsize

    def gather(self, items: np.ndarray, out_NQD: np.ndarray) -> None:
        """Copy pages into out_NQD[: len(items)]; Q rows of a page: its gate, up and down rows. items: layer * pages +
        page, all of one layer.

        Rows of padding get those of channel 0: finite values that no expert counts as its own.
        """
        layer = int(items[0]) // self.pages
        channels_R = np.maximum(self.order_LR[layer], 0)
        for place, page in enumerate((np.asarray(items) % self.pages).tolist()):
            rows_R = channels_R[page * self.page : (page + 1) * self.page]
            for weight, weight_LFD in enumerate(self.weights):
                out = out_NQD[place, weight * self.page : (weight + 1) * self.page]
                np.take(weight_LFD[layer], rows_R, axis=0, out=out, mode="clip")


class _Load:
    """One piece of work: pages of one layer, at most as many as the largest staging buffer holds."""

    __slots__ = ("items", "slots", "size", "rows", "done")

    def __init__(self, items: np.ndarray, slots: np.ndarray, size: int):
        self.items, self.slots, self.size = items, slots, size
        self.rows: jax.Array | None = None
        self.done = threading.Event()


@dataclasses.dataclass
class Moved:
    """Bytes of completed loads by reason, and what waiting for them cost.

    prefetch: was on the device when it was asked for; demand: was waited for. stall_s: seconds of that waiting.
    """

    loads: int = 0
    prefetch_bytes: int = 0
    demand_bytes: int = 0
    stall_s: float = 0.0

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.prefetch_bytes + self.demand_bytes


class Transfers:
    """The thread between host rows and device.

    sizes: numbers of pages of a staging buffer, ascending: a load is sent in the smallest that holds it, padded, so
    that the program that writes it into the pool has few shapes. ahead: buffers that may wait on the device to be
    taken, at most; beside the expert budget they take ahead * sizes[-1] * page_bytes there, and what was taken stays
    until the call that writes it into the pool has run, which the host does not wait for. sent: a list that gets
    every transfer.

    An error of the thread is raised by the next `issue` or `take`. Close it, or use it as a context.
    """

    def __init__(
        self,
        host: HostRows,
        device: jax.Device,
        *,
        sizes: tuple[int, ...] = (4, 32),
        ahead: int = 4,
        sent: list[Sent] | None = None,
    ):
        require(ahead >= 1, f"ahead={ahead} must be at least 1")
        self._sent = sent
        self.host, self.sizes, self.moved = host, sizes, Moved()
        self._target = jax.sharding.SingleDeviceSharding(device)
        # DMA needs pinned memory; where the backend has it, rows go through it
        pinned = any(memory.kind == "pinned_host" for memory in device.addressable_memories())
        self._pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host") if pinned else None
        self._keeps = _keeps_buffers(self._target)
        self._staging: dict[int, np.ndarray] = {}
        self._queue: collections.deque[_Load] = collections.deque()
        self._changed = threading.Condition()
        self._room, self._closed, self._error = ahead, False, None
        self._thread = threading.Thread(target=self._run, name="expert transfers", daemon=True)
        self._thread.start()

    def issue(self, items: np.ndarray, slots: np.ndarray) -> list[_Load]:
        """Queue pages of one layer (ids int32 [n]) for their slots [n]; the loads are to be taken in this order."""
        largest = self.sizes[-1]
        loads = []
        for at in range(0, len(items), largest):
            part = slice(at, min(at + largest, len(items)))
            size = next(size for size in self.sizes if size >= part.stop - at)
            loads.append(_Load(np.asarray(items[part], np.int32), np.asarray(slots[part], np.int32), size))
        with self._changed:
            self._check()
            self._queue.extend(loads)
            self._changed.notify_all()
        return loads

    def take(self, load: _Load) -> jax.Array:
        """The pages of a load on the device, [size, Q, D], what follows them is old. Waits for them."""
        ready = load.done.is_set()
        if not ready:
            start = time.perf_counter()
            load.done.wait()
            self.moved.stall_s += time.perf_counter() - start
        with self._changed:
            if load.rows is None:
                self._check()
            self._room += 1
            self._changed.notify_all()
        rows, load.rows = load.rows, None
        assert rows is not None, "a load is taken once"
        moved = len(load.items) * self.host.page_bytes
        self.moved.loads += len(load.items)
        if ready:
            self.moved.prefetch_bytes += moved
        else:
            self.moved.demand_bytes += moved
        return rows

    @property
    def pending(self) -> int:
        """Loads that are queued and not yet on the device."""
        return len(self._queue)

    def close(self) -> None:
        """End the thread; loads not taken are dropped. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Transfers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- the thread ----

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"the thread of expert transfers failed: {self._error!r}") from self._error
        if self._closed:
            raise RuntimeError("expert transfers are closed")

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or (self._queue and self._room > 0))
                    if self._closed:
                        break
                    self._room -= 1
                    load = self._queue[0]
                start = time.perf_counter()
                load.rows = self._send(load)
                if self._sent is not None:
                    size = len(load.items) * self.host.page_bytes
                    self._sent.append(Sent(start, time.perf_counter(), size))
                with self._changed:
                    self._queue.popleft()
                load.done.set()
        except BaseException as error:  # whatever it is, the engine must not wait for ever
            with self._changed:
                self._error = error
        finally:
            for load in self._queue:
                load.done.set()

    def _send(self, load: _Load) -> jax.Array:
        staging_NQD = self._staging.pop(load.size, None)
        if staging_NQD is None:
            staging_NQD = _aligned((load.size, *self.host.block), self.host.dtype)
        self.host.gather(load.items, staging_NQD)
        sent = staging_NQD if self._pinned is None else jax.device_put(staging_NQD, self._pinned)
        sent = jax.block_until_ready(jax.device_put(sent, self._target))
        if not self._keeps:
            self._staging[load.size] = staging_NQD
        return sent


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that every backend likes."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _keeps_buffers(target: jax.sharding.SingleDeviceSharding) -> bool:
    """Whether arrays of this device lie in the NumPy buffers they were made from.

    A CPU backend does not copy an aligned buffer, whatever `may_alias` says, and a buffer used again would change what
    was sent before.
    """
    buffer = _aligned((ALIGNMENT,), np.dtype(np.int32))
    sent = jax.block_until_ready(jax.device_put(buffer, target))
    buffer[:] = 1
    return bool(jax.device_get(sent)[0] == 1)
