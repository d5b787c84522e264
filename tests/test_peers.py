"""The line between processes, its ends in threads; how processes find each other; what a signal does."""

import errno
import json
import os
import queue
import signal
import socket
import threading
import time

import pytest
from checkpoints import raises

from readme_jax import distributed, peers
from readme_jax.config import ConfigError, DataError, PeerError
from readme_jax.distributed import Agreement, HostsConfig, Stop, arguments


def _pair():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


@pytest.fixture
def three(monkeypatch):
    """Open lines of processes 0, 1 and 2, and a queue of (thread's process, line said or exit code)."""
    seen = queue.SimpleQueue()
    server, card = peers.listen()
    found = {}
    threads = [
        threading.Thread(target=lambda p=p: found.update({p: peers.connect(card, p, 10, ("127.0.0.1",))}))
        for p in (1, 2)
    ]
    for thread in threads:
        thread.start()
    found[0] = peers.accept(server, card, 3, 10)
    for thread in threads:
        thread.join()
    monkeypatch.setattr(peers, "say", seen.put)
    monkeypatch.setattr(peers.os, "_exit", seen.put)
    yield found, seen
    for line in found.values():
        line.close()
        for link in line._links.values():
            link.close()


def test_values_and_errors_travel(three):
    line, _ = three
    line[1].tell(["value", {"a": [1, 2]}])
    line[2].tell(["value", None])
    line[1].tell(["aside", {"b": 3}])
    assert line[0].hear_aside(1) == {"b": 3}
    assert line[0].hear(1) == {"a": [1, 2]} and line[0].hear(2) is None
    line[0].tell(["error", "DataError", "text: empty"])
    for other in (1, 2):
        with raises(DataError, "text: empty"):
            line[other].hear(0)


def test_who_is_gone_is_named_once_by_each(three):
    """Process 2 dies: 0 sees it, tells 1, and does not report 1, which then ends as told."""
    line, seen = three
    line[2]._links[0].shutdown(2)
    said = [seen.get(timeout=10) for _ in range(6)]
    lines = [text for text in said if isinstance(text, str)]
    assert sorted(lines) == [
        f"error: process 0 is gone (its connection closed); process 2 ends too. {PeerError.advice}",
        f"error: process 2 is gone (its connection closed); process 0 ends too. {PeerError.advice}",
        f"error: process 2 is gone (its connection closed); process 1 ends too. {PeerError.advice}",
    ]
    assert [code for code in said if not isinstance(code, str)] == [76] * 3
    line[1]._links[0].shutdown(2)  # as told
    with pytest.raises(queue.Empty):
        seen.get(timeout=0.3)


def test_a_frozen_process_is_gone(monkeypatch):
    """Its connection stays open and its system answers, but no beat comes: each end finds that out by itself."""
    seen = queue.SimpleQueue()
    monkeypatch.setattr(peers, "say", seen.put)
    monkeypatch.setattr(peers.os, "_exit", seen.put)
    a, b = _pair()
    line = peers.Peers(0, {1: (a, a.makefile("rb"))}, 0.4)
    b.sendall(b'["value", 3]\n')
    assert line.hear(1) == 3
    assert json.loads(b.makefile("rb").readline()) == ["beat"]
    assert seen.get(timeout=10).startswith("error: process 1 is gone (no sign of life for 0 s); process 0 ends too.")
    assert seen.get(timeout=10) == 76
    line.close()


def test_beats_keep_a_silent_process(monkeypatch):
    seen = queue.SimpleQueue()
    monkeypatch.setattr(peers, "say", seen.put)
    monkeypatch.setattr(peers.os, "_exit", seen.put)
    a, b = _pair()
    lines = [peers.Peers(0, {1: (a, a.makefile("rb"))}, 0.8), peers.Peers(1, {0: (b, b.makefile("rb"))}, 0.8)]
    with pytest.raises(queue.Empty):
        seen.get(timeout=2)
    for line in lines:
        line.close()


@pytest.mark.parametrize("code, left", [(2, 2), (70, 70), (130, 76), (76, 76)])
def test_a_failure_is_reported_with_its_words_and_code(three, monkeypatch, code, left):
    """Bad input in one process alone is bad input for the run; all else is worth another start."""
    monkeypatch.setattr(peers, "GRACE", 0.1)
    line, seen = three
    line[1].tell(["failed", 1, "disk full", code])
    said = [seen.get(timeout=10) for _ in range(4)]
    lines = sorted(text for text in said if isinstance(text, str))
    assert [text.split(". ")[0] for text in lines] == [
        "error: process 1 failed (disk full); process 0 ends too",
        "error: process 1 failed (disk full); process 2 ends too",
    ]
    assert [PeerError.advice in text for text in lines] == [left == 76] * 2
    assert [number for number in said if not isinstance(number, str)] == [left] * 2


@pytest.mark.parametrize(
    "error, code, waits",
    [
        (DataError("text: empty"), 2, []),
        (OSError(errno.EIO, "Input/output error"), 70, [12.0]),
        (RuntimeError("INTERNAL: connection reset by peer"), 70, [12.0]),
    ],
)
def test_what_may_come_of_a_lost_process_waits_for_its_name(error, code, waits, monkeypatch, capsys):
    """Longer than the line needs to find out, and only then it is the error of this process."""

    class Line:
        process = 1

        def __init__(self):
            self.waited, self.failed = [], []

        def wait_for_end(self, seconds):
            self.waited.append(seconds)

        def fail(self, text, code):
            self.failed.append((text, code))
            raise SystemExit(code)

    line = Line()
    monkeypatch.setattr(distributed, "arguments", lambda *_: {})
    monkeypatch.setattr(distributed, "_start", lambda *_: monkeypatch.setattr(distributed, "_line", line))
    with pytest.raises(SystemExit), distributed.joined(HostsConfig(timeout=7)):
        raise error
    assert line.waited == waits and line.failed == [(str(error), code)]
    said = capsys.readouterr().err
    assert said.endswith(f"error: process 1: {error}\n") and ("Traceback" in said) == isinstance(error, RuntimeError)


def test_leaving_is_no_failure(three):
    line, seen = three
    for own in line.values():
        own.close()
    for own in line.values():
        for link in own._links.values():
            link.shutdown(2)
    with pytest.raises(queue.Empty):
        seen.get(timeout=0.3)


def test_nobody_answers():
    server, card = peers.listen()
    with raises(PeerError, "process 1 did not connect within 0 s"):
        peers.accept(server, card, 2, 0.05)
    with raises(PeerError, "process 1 cannot reach process 0", str(card["port"])):
        peers.connect(card | {"hosts": ["127.0.0.1"]}, 1, 1)


def test_strangers_are_sent_away(monkeypatch):
    """What else connects at the start ends nothing, and moves no deadline."""
    monkeypatch.setattr(peers, "HELLO", 0.3)
    server, card = peers.listen()
    key = json.dumps(card["key"]).encode()
    words = (
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"[]\n",
        b"\xff\n",
        b"[" * 5000,
        b'{"key": "other", "process": 1}\n',
        b'{"key": ' + key + b"}\n",
        b'{"key": ' + key + b', "process": 7}\n',
        b'{"key": ' + key + b', "process": "1"}\n',
    )
    strangers = [socket.create_connection(("127.0.0.1", card["port"])) for _ in (*words, "silent")]
    for stranger, text in zip(strangers, words):
        stranger.sendall(text)
        stranger.close()
    found = {}
    late = threading.Thread(target=lambda: found.update({1: peers.connect(card, 1, 10, ("127.0.0.1",))}))
    late.start()
    found[0] = peers.accept(server, card, 2, 10)
    late.join()
    found[0].tell(["value", 5])
    assert found[1].hear(0) == 5
    for line in found.values():
        line.close()
    server, card = peers.listen()
    monkeypatch.setattr(peers, "HELLO", 60)
    strangers += [socket.create_connection(("127.0.0.1", card["port"])) for _ in range(5)]
    began = time.monotonic()
    with raises(PeerError, "process 1 did not connect within 1 s"):
        peers.accept(server, card, 2, 0.7)
    assert time.monotonic() - began < 1.2
    for stranger in strangers:
        stranger.close()


def test_silent_connections_keep_nobody_waiting(monkeypatch):
    """Many of them, before a process comes whose words arrive in pieces with the next message behind them."""
    monkeypatch.setattr(peers, "HELLO", 60)
    server, card = peers.listen()
    silent = [socket.create_connection(("127.0.0.1", card["port"])) for _ in range(50)]
    hello = json.dumps({"key": card["key"], "process": 1}).encode() + b'\n["value", 7]\n["aside", 8]\n["val'
    late = socket.create_connection(("127.0.0.1", card["port"]))
    late.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    silent[0].sendall(b"x")

    def speak():
        for piece in (hello[:5], hello[5:20], hello[20:]):
            late.sendall(piece)
            time.sleep(0.05)

    speaking = threading.Thread(target=speak)
    speaking.start()
    began = time.monotonic()
    line = peers.accept(server, card, 2, 30)
    assert time.monotonic() - began < 5
    speaking.join()
    late.sendall(b'ue", 9]\n')
    assert [line.hear(1), line.hear(1), line.hear_aside(1)] == [7, 9, 8]
    assert all(each.recv(1) == b"" for each in silent[1:]), "they are sent away when all are there"
    line.close()
    for link in (*silent, late):
        link.close()


def test_a_silent_connection_is_sent_away_in_time(monkeypatch):
    monkeypatch.setattr(peers, "HELLO", 0.2)
    server, card = peers.listen()
    found = []
    waiting = threading.Thread(target=lambda: found.append(peers.accept(server, card, 2, 30)))
    waiting.start()
    silent = [socket.create_connection(("127.0.0.1", card["port"]), 10) for _ in range(3)]
    assert [each.recv(1) for each in silent] == [b""] * 3 and not found
    found.append(peers.connect(card, 1, 10, ("127.0.0.1",)))
    waiting.join()
    for line in found:
        line.close()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"coordinator": "host"}, "hosts.coordinator='host' must be host:port"),
        ({"processes": -1}, "hosts.processes=-1 must not be negative"),
        ({"processes": 2, "process": 2}, "hosts.process=2 must be below hosts.processes=2"),
        ({"process": -2}, "hosts.process=-2 must be 0 or more, or -1"),
        ({"start_timeout": 0}, "hosts.start_timeout=0 must be at least 1"),
        ({"timeout": 1}, "hosts.timeout=1 must be at least 5"),
    ],
)
def test_fields_that_cannot_be(fields, words):
    with raises(ConfigError, words):
        HostsConfig(**fields)


def test_how_processes_are_found():
    jax_vars = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    full = {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
    on_cpu = {"JAX_PLATFORMS": "cpu"}
    assert arguments(HostsConfig(), on_cpu) is None, "one process"
    assert arguments(HostsConfig(), on_cpu | jax_vars) == full
    assert arguments(HostsConfig(coordinator="b:2", process=0), on_cpu | jax_vars) == full | {
        "coordinator_address": "b:2", "process_id": 0,
    }  # fmt: skip
    assert arguments(HostsConfig(processes=1), on_cpu | jax_vars | slurm) is None, "one, whatever is around it"
    assert arguments(HostsConfig(), on_cpu | slurm) == {}, "JAX asks SLURM"
    assert arguments(HostsConfig(), on_cpu | slurm | {"SLURM_NTASKS": "1"}) is None
    with raises(ConfigError, "hosts.coordinator, hosts.process: needed too"):
        arguments(HostsConfig(processes=2), on_cpu)
    with raises(ConfigError, "JAX_NUM_PROCESSES='two' must be a whole number"):
        arguments(HostsConfig(), on_cpu | {"JAX_NUM_PROCESSES": "two"})


def test_one_process_agrees_with_itself(mesh):
    assert distributed.rank() == 0 and distributed.is_main()
    assert distributed.everyone(3) == [3] and distributed.on_main(lambda: 4) == 4
    agreement = Agreement()
    assert [agreement.step(wish) for wish in (0, 2, 1)] == [0, 2, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once(number, capfd):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.asked == ""
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        assert signal.getsignal(number) == before, "a second one does what it always did"
    assert signal.getsignal(number) == before
    assert f"{number.name}: the run saves itself at the next step" in capfd.readouterr().err
