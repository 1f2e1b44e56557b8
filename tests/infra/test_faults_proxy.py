"""The fault proxy does what its faults are called, and counts it: what the fault suite says rests on that."""

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fault_proxy import COLLISION, FAULTS, FaultProxy, Request

BODY = b"0123456789" * 20
Put = tuple[str, bytes]
# The status that the sender is told, None for none, and whether what it asked for is done.
EFFECTS: dict[str, tuple[int | None, bool]] = {
    "error-500": (500, False),
    "error-503": (503, False),
    "reset": (None, False),
    "cut-upload": (None, False),
    "late": (None, True),
    "swallow": (None, True),
    "masked": (500, True),
    "cut-reply": (None, True),
    "slow": (200, True),
    COLLISION: (409, False),
}


class Keeper(BaseHTTPRequestHandler):
    """Keeps what it is sent, and sends it back."""

    protocol_version = "HTTP/1.1"
    kept: list[Put]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        # a server that gets half a body does nothing
        if len(body) == int(self.headers["Content-Length"]):
            self.kept.append((self.path, body))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to the test's output."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that are cut are what is wanted."""


@pytest.fixture
def kept() -> list[Put]:
    return []


@pytest.fixture
def upstream(kept: list[Put]) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), type("Keeping", (Keeper,), {"kept": kept}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def put(proxy: FaultProxy, path: str = "/object") -> tuple[int, bytes] | None:
    """Status and body of the reply; None when there was none, or half of one."""
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    try:
        connection.request("PUT", path, BODY, {"Expect": "100-continue"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("fault", [*FAULTS, COLLISION])
def test_each_fault_is_what_it_is_called(upstream: str, kept: list[Put], fault: str):
    status, done = EFFECTS[fault]
    with FaultProxy(upstream) as proxy:
        proxy.inject(fault, lambda request: request.path == "/a key", nth=2)
        for number in range(3):
            found = put(proxy, "/a%20key")
            if number == 1:
                assert (found[0] if found else None) == status
            else:
                assert found == (200, BODY)
        deadline = time.monotonic() + 10
        while fault == "late" and len(kept) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert kept == [("/a%20key", BODY)] * (3 if done else 2)
        assert (proxy.counts, len(proxy.seen)) == ({fault: 1}, 3)


def test_the_same_seed_hits_the_same_requests_and_about_as_many_as_were_asked_for(upstream: str):
    told = []
    for seed in (1, 1, 2):
        with FaultProxy(upstream, rate=0.3, seed=seed, faults=("error-500", "error-503")) as proxy:
            told.append([(put(proxy) or (0,))[0] for _ in range(60)])
            assert proxy.injected == sum(status != 200 for status in told[-1])
    assert told[0] == told[1] != told[2]
    assert all(6 <= sum(status != 200 for status in line) <= 30 for line in told)


def test_rules_count_what_they_match_and_say_when_it_is_done(upstream: str, kept: list[Put]):
    seen: list[int] = []

    def is_second_kind(request: Request) -> bool:
        return request.method == "PUT" and request.path.startswith("/b")

    with FaultProxy(upstream) as proxy:
        rule = proxy.inject("swallow", is_second_kind, nth=2, times=2, then=lambda: seen.append(len(kept)))
        replies = [put(proxy, path) for path in ("/a", "/b1", "/b2", "/a", "/b3", "/b4")]
    assert [reply is None for reply in replies] == [False, False, True, False, True, False]
    # each was done by then
    assert (rule.met, seen) == (4, [3, 5])
    with pytest.raises(ValueError, match="fault 'flood' is unknown"):
        proxy.inject("flood", is_second_kind)
