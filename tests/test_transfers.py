"""Expert pages from host to device: right rows, right order, bounded, counted, and no error is lost in a thread."""

import threading

import jax
import numpy as np
import pytest

from readme_jax.config import ConfigError
from readme_jax.serving.transfers import HostRows, Transfers

L, F, D, PAGE, PAGES = 3, 40, 16, 4, 8
RNG = np.random.default_rng(0)
WEIGHTS = tuple(RNG.normal(size=(L, F, D)).astype(np.float32) for _ in range(3))
ORDER = np.stack([RNG.permutation(F)[: PAGES * PAGE] for _ in range(L)]).astype(np.int32)
ORDER[:, -2:] = -1  # the last page is not full
HOST = HostRows(WEIGHTS, ORDER, PAGE)


def expected(item):
    """[3 * PAGE, D]: gate, up and down rows of a page."""
    layer, page = divmod(item, PAGES)
    channels = ORDER[layer, page * PAGE : (page + 1) * PAGE]
    return np.concatenate([weight[layer][np.maximum(channels, 0)] for weight in WEIGHTS])


def device():
    return jax.devices()[0]


class Held(HostRows):
    """Host rows whose gathers wait for the test."""

    def __init__(self):
        super().__init__(WEIGHTS, ORDER, PAGE)
        object.__setattr__(self, "allowed", threading.Semaphore(0))
        object.__setattr__(self, "started", threading.Semaphore(0))

    def gather(self, items, out_NQD):
        self.started.release()
        assert self.allowed.acquire(timeout=30)
        super().gather(items, out_NQD)


def items_of(layer, *pages):
    return np.array([layer * PAGES + p for p in pages], np.int32)


def test_rows_arrive_whatever_is_sent_after_them():
    with Transfers(HOST, device(), sizes=(2, 4), ahead=64) as transfers:
        wanted, loads = [], []
        for step in range(20):
            items = items_of(step % L, *RNG.permutation(PAGES)[: 1 + step % 7])
            for load in transfers.issue(items, np.arange(len(items))):
                loads.append(load)
            wanted.append(items)
        assert [load.size for load in loads[:6]] == [2, 2, 4, 4, 4, 2] and all(len(x.items) <= x.size for x in loads)
        # all are on the device before the first is looked at: a staging buffer used twice would show
        for load in loads:
            assert load.done.wait(30)
        taken = [(load.items, transfers.take(load)) for load in loads]
        assert np.concatenate(wanted).tolist() == np.concatenate([items for items, _ in taken]).tolist()
        for items, rows in taken:
            assert rows.devices() == {device()} and rows.shape[1:] == (3 * PAGE, D)
            for place, item in enumerate(items.tolist()):
                np.testing.assert_array_equal(rows[place], expected(item))
        count = sum(map(len, wanted))
        assert transfers.moved.loads == count and transfers.moved.bytes == count * 3 * PAGE * D * 4
        assert transfers.moved.demand_bytes == 0 and transfers.moved.stall_s == 0 and transfers.pending == 0


def test_slots_travel_with_their_items():
    with Transfers(HOST, device(), sizes=(2,)) as transfers:
        loads = transfers.issue(items_of(1, 4, 2, 0), np.array([9, 7, 5]))
        assert [(x.items.tolist(), x.slots.tolist()) for x in loads] == [([12, 10], [9, 7]), ([8], [5])]
        assert transfers.issue(np.array([], np.int32), np.array([], np.int32)) == []


def test_memory_ahead_is_bounded_and_order_kept():
    host = Held()
    with Transfers(host, device(), sizes=(1,), ahead=2) as transfers:
        loads = transfers.issue(items_of(0, *range(5)), np.arange(5))
        for _ in range(5):
            host.allowed.release()
        assert loads[1].done.wait(30) and transfers.pending == 3
        assert host.started.acquire(timeout=30) and host.started.acquire(timeout=30)
        assert not host.started.acquire(timeout=0.05) and not loads[2].done.is_set(), "no third before one is taken"
        transfers.take(loads[0])
        assert loads[2].done.wait(30) and not loads[3].done.is_set()


def test_what_is_waited_for_counts_as_demand():
    host = Held()
    with Transfers(host, device(), sizes=(4,)) as transfers:
        (first,), (second,) = transfers.issue(items_of(0, 1, 2), np.arange(2)), transfers.issue(items_of(1, 3), [0])
        threading.Timer(0.05, host.allowed.release).start()
        transfers.take(first)
        assert transfers.moved.demand_bytes == 2 * HOST.page_bytes and transfers.moved.stall_s > 0.01
        host.allowed.release()
        assert second.done.wait(30)
        stall = transfers.moved.stall_s
        transfers.take(second)
        assert transfers.moved.prefetch_bytes == HOST.page_bytes and transfers.moved.stall_s == stall


def test_an_error_of_the_thread_reaches_the_caller():
    bad = HostRows((WEIGHTS[0], WEIGHTS[1], WEIGHTS[2][:1]), ORDER, PAGE)
    transfers = Transfers(bad, device(), sizes=(1,))
    loads = transfers.issue(items_of(0, 0), [0]) + transfers.issue(items_of(2, 1, 2), [0, 1])
    transfers.take(loads[0])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="thread of expert transfers failed: IndexError"):
            transfers.take(loads[1])
        with pytest.raises(RuntimeError, match="expert transfers failed"):
            transfers.issue(items_of(0, 0), [0])
    transfers.close()
    assert not transfers._thread.is_alive()


def test_closing_ends_the_thread_with_work_left():
    host = Held()
    transfers = Transfers(host, device(), sizes=(1,))
    loads = transfers.issue(items_of(0, 0, 1, 2), np.arange(3))
    assert host.started.acquire(timeout=30)
    host.allowed.release()
    transfers.close()
    transfers.close()
    assert not transfers._thread.is_alive() and "expert transfers" not in {t.name for t in threading.enumerate()}
    with pytest.raises(RuntimeError, match="are closed"):
        transfers.issue(items_of(0, 0), [0])
    with pytest.raises(RuntimeError, match="are closed"):
        transfers.take(loads[2])


def test_ahead_must_be_positive():
    with pytest.raises(ConfigError, match="ahead=0 must be at least 1"):
        Transfers(HOST, device(), ahead=0)


def test_under_the_transfer_guard():
    """Everything it moves, it moves on purpose."""
    with jax.transfer_guard("disallow"), Transfers(HOST, device()) as transfers:
        transfers.take(transfers.issue(items_of(0, 0), [0])[0])
