"""What tests of a running endpoint share: reading a stream of server-sent events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROUTE = "/v1/images/generations"


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
