"""A line between the processes of a run, by way of process 0: small values, errors, and notice of an end. No JAX.

Process 0 listens, the others keep one TCP connection to it, and a thread waits at each end. When a process dies its
connections close, so every other one knows at once and ends by itself with one line, whatever its main thread waits
for; when it is frozen or its host is lost, its beats stay away. Without this, a collective of JAX would wait for ever
on some backends, and die of a stack trace on others.
"""

import contextlib
import json
import os
import queue
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any, BinaryIO, NoReturn

from readme_jax.config import UNEXPECTED, PeerError, ReadMeError, require

GRACE = 5.0  # seconds that a process has to report an error of its own when another one has reported one
HELLO = 5.0  # seconds that a connection has to say who it is
Message = list[Any]
Link = tuple[socket.socket, BinaryIO]


def listen() -> tuple[socket.socket, dict[str, Any]]:
    """Process 0: a listening socket, and the card (JSON) by which the others find it and prove that they belong."""
    dual = socket.has_dualstack_ipv6()
    server = socket.create_server(
        ("::" if dual else "", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
    )
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name, _, addresses = socket.gethostbyname_ex(name)
        return server, _card(server, [*addresses, name])
    return server, _card(server, [name])


def _card(server: socket.socket, hosts: list[str]) -> dict[str, Any]:
    return {"hosts": hosts[:8], "port": server.getsockname()[1], "key": secrets.token_hex(8)}


def accept(server: socket.socket, card: dict[str, Any], processes: int, timeout: float) -> "Peers":
    """Process 0: wait for every other process; who else connects is sent away, and keeps nobody waiting. PeerError when
    one does not come within `timeout` seconds."""
    links: dict[int, Link] = {}
    unknown: dict[socket.socket, tuple[float, bytes]] = {}  # until when each may say who it is, and what it said
    end = time.monotonic() + timeout
    with server, selectors.DefaultSelector() as ready:

        def drop(link: socket.socket) -> None:
            ready.unregister(link)
            del unknown[link]

        server.setblocking(False)
        ready.register(server, selectors.EVENT_READ)
        while missing := sorted(set(range(1, processes)) - set(links)):
            now = time.monotonic()
            for link in [link for link, (last, _) in unknown.items() if last <= now]:
                drop(link)
                link.close()
            if now >= end:
                for link in unknown:
                    link.close()
                raise PeerError(f"process {missing[0]} did not connect within {timeout:.0f} s")
            for key, _ in ready.select(min([end, *(last for last, _ in unknown.values())]) - now):
                if key.fileobj is server:
                    with contextlib.suppress(BlockingIOError, ConnectionError):  # it is gone again
                        link, _ = server.accept()
                        link.setblocking(False)
                        ready.register(link, selectors.EVENT_READ)
                        unknown[link] = (now + HELLO, b"")
                    continue
                link: socket.socket = key.fileobj  # pyright: ignore[reportAssignmentType]
                last, said = unknown[link]
                more = _rest_of_line(link)
                unknown[link] = (last, said + more)
                if more and not more.endswith(b"\n") and len(said + more) < 500:
                    continue
                drop(link)
                process = _process(said + more, card["key"])
                if process in links or not 0 < process < processes:
                    link.close()
                    continue
                link.settimeout(timeout)
                links[process] = (link, link.makefile("rb"))
        for link in unknown:
            link.close()
    return Peers(0, links, timeout)


def _rest_of_line(link: socket.socket) -> bytes:
    """What has come, up to the end of a line and not beyond: that is for who listens next. Empty when it is closed."""
    with contextlib.suppress(OSError):
        seen = link.recv(500, socket.MSG_PEEK)
        return link.recv(seen.find(b"\n") + 1 or len(seen)) if seen else b""
    return b""


def _process(line: bytes, key: str) -> int:
    """The number of the process that knows the key; -1 for anybody else."""
    with contextlib.suppress(ValueError, RecursionError):
        hello = json.loads(line)
        if isinstance(hello, dict) and hello.get("key") == key and type(hello.get("process")) is int:
            return hello["process"]
    return -1


def connect(card: dict[str, Any], process: int, timeout: float, hosts: tuple[str, ...] = ()) -> "Peers":
    """Every other process: reach process 0 at one of `hosts` or the card's. PeerError when none answers."""
    for host in (*hosts, *card["hosts"]):
        with contextlib.suppress(OSError):
            link = socket.create_connection((host, card["port"]), timeout)
            link.sendall(_line({"key": card["key"], "process": process}))
            return Peers(process, {0: (link, link.makefile("rb"))}, timeout)
    tried = ", ".join(dict.fromkeys((*hosts, *card["hosts"])))
    raise PeerError(f"process {process} cannot reach process 0 at port {card['port']} of {tried}")


class Peers:
    """The open line of one process. links: socket and reader for every process it talks to."""

    def __init__(self, process: int, links: dict[int, Link], timeout: float):
        self.process, self._timeout = process, timeout
        self._links = {other: link for other, (link, _) in links.items()}
        self._inbox: dict[int, queue.SimpleQueue[Message]] = {other: queue.SimpleQueue() for other in links}
        self._aside: dict[int, queue.SimpleQueue[Any]] = {other: queue.SimpleQueue() for other in links}
        self._sending, self._failing, self._left = threading.Lock(), threading.Event(), set[int]()
        self._ending = threading.Lock()  # taken by the thread that ends this process, and kept
        self._threads = [
            threading.Thread(target=self._listen, args=(other, reader), daemon=True)
            for other, (_, reader) in links.items()
        ]
        for link in self._links.values():
            link.settimeout(timeout)  # of every read: beats come more often
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._closed = threading.Event()
        for thread in (*self._threads, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    def tell(self, message: Message, *, but: int = -1) -> None:
        """Send to every link except that of process `but`."""
        with self._sending:
            for other, link in self._links.items():
                if other != but:
                    with contextlib.suppress(OSError):  # the thread that listens there learns of it
                        link.sendall(_line(message))

    def hear(self, other: int) -> Any:
        """The next value of process `other`. Its ReadMeError is raised here too; if it dies, this process ends."""
        kind, *rest = self._inbox[other].get()
        if kind == "error":
            kinds = {ReadMeError, *_subclasses(ReadMeError)}
            raise {k.__name__: k for k in kinds}[rest[0]](rest[1])
        return rest[0]

    def hear_aside(self, other: int) -> Any:
        """The next value that process `other` told aside; if it dies, this process ends."""
        return self._aside[other].get()

    def close(self) -> None:
        """Take leave: from now on the end of this process is no failure."""
        self.tell(["bye"])
        self._left |= set(self._links)
        self._closed.set()

    def fail(self, text: str, code: int) -> NoReturn:
        """Tell the others why this process fails, and end it with exit code `code`. `text` has been shown here."""
        self._failing.set()
        self.tell(["failed", self.process, text, code])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._exit(code, 2 * GRACE)

    def wait_for_end(self, seconds: float) -> None:
        """Give the threads time to learn of a dead process and to end this one: then it does not return."""
        self._failing.wait(seconds)

    def _beat(self) -> None:
        while not self._closed.wait(self._timeout / 4):
            self.tell(["beat"])

    def _listen(self, other: int, reader: BinaryIO) -> None:
        why = "its connection closed"
        try:
            for line in reader:
                kind, *rest = message = json.loads(line)
                if kind == "beat":
                    continue
                if kind == "bye":
                    self._left.add(other)
                elif kind == "aside":
                    self._aside[other].put(rest[0])
                elif kind == "gone":
                    self._end(other, f"process {rest[0]} is gone ({rest[1]})")
                elif kind == "failed":
                    self._failed(other, message)
                else:
                    self._inbox[other].put(message)
        except TimeoutError:
            why = f"no sign of life for {self._timeout:.0f} s"
        except (OSError, ValueError):
            pass
        if other not in self._left and not self._failing.is_set():
            self._end(other, f"process {other} is gone ({why})", ["gone", other, why])

    def _end(self, source: int, what: str, message: Message | None = None, code: int = PeerError.exit_code) -> None:
        # Once only: those that process 0 has told end too, and are not to be reported as gone.
        if self._ending.acquire(blocking=False):
            if self.process == 0 and message is not None:
                self.tell(message, but=source)
            advice = f". {PeerError.advice}" if code == PeerError.exit_code else ""
            say(f"error: {what}; process {self.process} ends too{advice}")
            self._exit(code, 2.0)

    def _exit(self, code: int, linger: float) -> NoReturn:
        # Process 0 runs JAX's coordination service: the others should be gone before it, or JAX aborts them.
        end = time.monotonic() + linger
        for thread in self._threads if self.process == 0 else ():
            if thread is not threading.current_thread():
                thread.join(max(end - time.monotonic(), 0.0))
        # Not sys.exit: the main thread may wait for ever, and JAX's own shutdown would wait for the dead, then abort.
        os._exit(code)

    def _failed(self, source: int, message: Message) -> None:
        if self.process == 0:
            self.tell(message, but=source)
        # An error that every process runs into, as most are, is reported by each in its own way.
        if not self._failing.wait(GRACE):
            _, process, text, code = message
            # Bad input is what it is for all, and so is what nobody foresaw: scripts that start the command again do so
            # never after the one, and a few times after the other.
            left = code if code in (ReadMeError.exit_code, UNEXPECTED) else PeerError.exit_code
            self._end(source, f"process {process} failed ({text})", code=left)


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _subclasses(kind: type) -> list[type]:
    return [c for child in kind.__subclasses__() for c in (child, *_subclasses(child))]


def say(text: str) -> None:
    """One line on stderr, whatever another thread is writing."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{' '.join(text.split())}\n".encode())


def check_address(text: str, where: str) -> tuple[str, int]:
    """(host, port) of `host:port`; ConfigError naming `where` otherwise."""
    host, _, port = text.rpartition(":")
    require(bool(host) and port.isdigit() and 0 < int(port) < 65536, f"{where}={text!r} must be host:port")
    return host.strip("[]"), int(port)
