"""A proxy in front of an HTTP server that does to requests what networks and busy servers do, and counts it.

Which requests it hits follows from a seed and the order in which they arrive; single ones can be chosen by rules.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

# What becomes of a request, and what its sender is told.
FAULTS = (
    "error-500",  # not passed on; InternalError
    "error-503",  # not passed on; SlowDown
    "reset",  # not passed on; the connection is reset
    "cut-upload",  # passed on up to the middle, then both connections are cut
    "late",  # the connection is reset, and the request arrives a little later all the same
    "swallow",  # done, but the connection is reset instead of a reply
    "masked",  # done, but the reply says InternalError
    "cut-reply",  # done, but the connection is closed in the middle of the reply
    "slow",  # done and told, in small pieces
)
# Only by a rule: S3 says it to writers that meet, and to no one else.
COLLISION = "error-409"
PIECES, PIECE_S = 5, 0.01
LATEST_S = 0.3
_ERRORS = {
    "409": ("ConditionalRequestConflict", "The conditional request cannot succeed due to a conflicting operation."),
    "500": ("InternalError", "We encountered an internal error."),
    "503": ("SlowDown", "Please slow down."),
}


@dataclass(frozen=True)
class Request:
    """One request: `path` is decoded and without its query, `number` counts from 1."""

    number: int
    method: str
    path: str
    head: bytes
    body: bytes


@dataclass
class Rule:
    """From the nth request on that it matches, `times` of them get the fault; `then` is called when it is done."""

    fault: str
    matches: Callable[[Request], bool]
    nth: int = 1
    times: int = 1
    then: Callable[[], None] = lambda: None
    met: int = 0

    def hits(self, request: Request) -> bool:
        if not self.matches(request):
            return False
        self.met += 1
        return self.nth <= self.met < self.nth + self.times


class FaultProxy:
    """Listens on a free port of 127.0.0.1; `rate` is the share of requests that get one of `faults`."""

    def __init__(self, upstream: str, *, rate: float = 0.0, seed: int = 0, faults: Sequence[str] = FAULTS) -> None:
        self.rate, self.faults = rate, tuple(faults)
        self.rules: list[Rule] = []
        self.seen: list[Request] = []  # without their bodies
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._guard = threading.Lock()
        self._open: set[_Wire] = set()
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def injected(self) -> int:
        return sum(self.counts.values())

    def inject(self, fault: str, matches: Callable[[Request], bool], **options: Any) -> Rule:
        """Add a rule; see Rule for the options."""
        if fault not in (*FAULTS, COLLISION):
            raise ValueError(f"fault {fault!r} is unknown: choose one of {(*FAULTS, COLLISION)}")
        rule = Rule(fault, matches, **options)
        self.rules.append(rule)
        return rule

    def close(self) -> None:
        """End all connections, and take no further ones."""
        # close() alone does not wake the thread that waits in accept()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for wire in list(self._open):
            wire.wake()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            wire = _Wire(client)
            self._open.add(wire)
            threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, client: _Wire) -> None:
        """Answer one connection's requests until either side goes away."""
        server: _Wire | None = None
        with suppress(OSError, EOFError):
            while True:
                head = client.head()
                if b"\r\nexpect: 100-continue" in head.lower():
                    client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                    head = _without_expect(head)
                body = client.body(head)
                request, rule, fault = self._decide(head, body)
                server = server or self._connect()
                try:
                    goes_on = _deal(fault, request, client, server, self._connect)
                finally:
                    if rule:
                        rule.then()
                if not goes_on:
                    break
        self._open.discard(client)
        client.reset()
        if server:
            server.reset()

    def _decide(self, head: bytes, body: bytes) -> tuple[Request, Rule | None, str | None]:
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        with self._guard:
            request = Request(len(self.seen) + 1, method, unquote(target.split("?", 1)[0]), head, body)
            self.seen.append(replace(request, body=b""))
            hit, fault = self._random.random() < self.rate, self._random.choice(self.faults)
            # every rule counts every request it matches
            rule = next((rule for rule in [r for r in self.rules if r.hits(request)]), None)
            chosen = rule.fault if rule else fault if hit else None
            if chosen:
                self.counts[chosen] += 1
        return request, rule, chosen

    def _connect(self) -> _Wire:
        return _Wire(socket.create_connection(self._upstream))


def _deal(fault: str | None, request: Request, client: _Wire, server: _Wire, connect: Callable[[], _Wire]) -> bool:
    """Pass one request on, with a fault or without; False when the connection is done for."""
    whole = request.head + request.body
    if fault in ("error-500", "error-503", COLLISION):
        client.send(_error(fault[-3:], request.method))
        return True
    if fault == "late":
        threading.Thread(target=_send_later, args=(whole, request.number, connect), daemon=True).start()
    if fault in ("reset", "late"):
        return False
    if fault == "cut-upload":
        server.send(request.head + request.body[: len(request.body) // 2] if request.body else whole[: len(whole) // 2])
        return False
    server.send(whole, slowly=fault == "slow")
    reply = server.reply(request.method)
    if fault == "swallow":
        return False
    if fault == "masked":
        reply = _error("500", request.method)
    if fault == "cut-reply":
        client.send(reply[: 2 * len(reply) // 3])
        client.end()
        return False
    client.send(reply, slowly=fault == "slow")
    return True


def _send_later(data: bytes, number: int, connect: Callable[[], _Wire]) -> None:
    time.sleep(random.Random(number).uniform(0, LATEST_S))
    with suppress(OSError, EOFError):
        server = connect()
        server.send(data)
        # a server may drop the request of one who is gone before it has read it
        server.head()
        server.reset()


def _error(status: str, method: str) -> bytes:
    code, message = _ERRORS[status]
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else xml.encode())


def _without_expect(head: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))


def _header(head: bytes, name: str) -> str:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip().lower()
    return ""


class _Wire:
    """One end of a connection, read in units of HTTP. EOFError when the other side has gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()

    def send(self, data: bytes, *, slowly: bool = False) -> None:
        size = -(-len(data) // PIECES) if slowly else len(data)
        for start in range(0, len(data), max(size, 1)):
            if start:
                time.sleep(PIECE_S)
            self._socket.sendall(data[start : start + size])

    def head(self) -> bytes:
        return self._until(b"\r\n\r\n")

    def body(self, head: bytes) -> bytes:
        """The body that a head announces, as it is on the wire."""
        if "chunked" in _header(head, "transfer-encoding"):
            return self._chunks()
        return self._exactly(int(_header(head, "content-length") or 0))

    def reply(self, method: str) -> bytes:
        head = self.head()
        status = int(head.split(b" ", 2)[1])
        if status < 200:
            return self.reply(method)
        return head if method == "HEAD" or status in (204, 304) else head + self.body(head)

    def reset(self) -> None:
        """Close at once; the other side sees a reset connection, or the end where it has gone first."""
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def wake(self) -> None:
        """Let whoever waits for data know that none will come: what was sent arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Close in peace."""
        self.wake()
        self._socket.close()

    def _chunks(self) -> bytes:
        body = b""
        while True:
            size = self._until(b"\r\n")
            if int(size.split(b";")[0], 16) == 0:
                # the trailers, of which there may be none
                while (line := self._until(b"\r\n")) != b"\r\n":
                    size += line
                return body + size + line
            body += size + self._exactly(int(size.split(b";")[0], 16) + 2)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._fill()
        return self._take(self._buffer.index(mark) + len(mark))

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _fill(self) -> None:
        data = self._socket.recv(1 << 18)
        if not data:
            raise EOFError
        self._buffer += data
