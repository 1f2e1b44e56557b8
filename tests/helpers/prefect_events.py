"""Events that a Prefect server has taken in, once it shows them."""

import time
from typing import Any

import httpx

Event = dict[str, Any]


def wait_for_event(api_url: str, event: str, seconds: float = 300.0, **payload: Any) -> Event:
    """The newest event of this name whose payload has these values. AssertionError if there is none in time."""
    asked = {"filter": {"event": {"name": [event]}}, "limit": 50}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = httpx.post(f"{api_url}/events/filter", json=asked, timeout=30).raise_for_status().json()
        for found in answer["events"]:
            if all(found["payload"].get(key) == value for key, value in payload.items()):
                return found
        time.sleep(0.5)
    raise AssertionError(f"no event {event} with {payload} in {seconds:.0f} s")
