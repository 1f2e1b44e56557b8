"""What tests of a running endpoint share: a server, its token file, and reading a stream of server-sent events."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from waiting import wait_for

ROUTE = "/v1/images/generations"


@contextmanager
def serve(application) -> Iterator[str]:
    """An ASGI application on a free port; yields its URL."""
    import uvicorn

    config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def events_of(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of each event, after its name was held against the type in it."""
    name = ""
    for line in reply.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            assert name == data.get("type", "error")
            yield data


def token_file(path: Path, **entries: tuple[str, str]) -> Path:
    """A token file with name=(scopes, token)."""
    lines = [
        f"{name} {scopes} {hashlib.sha256(token.encode()).hexdigest()}" for name, (scopes, token) in entries.items()
    ]
    path.write_text("# name scopes sha256\n\n" + "\n".join(lines) + "\n")
    return path
