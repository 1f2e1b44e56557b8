"""Waiting in tests, for as long as a slow machine may need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

# ends only what is broken
PATIENCE_S = 300.0

T = TypeVar("T")


def wait_for(
    found: Callable[[], T], what: str = "it", pause_s: float = 0.02, pause: Callable[[float], object] = time.sleep
) -> T:
    """What `found` returns, once that is true; AssertionError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} did not come in {PATIENCE_S:.0f} s"
        pause(pause_s)
    return value
