"""Events that a Prefect server has taken in, once it shows them."""

from typing import Any

import httpx
from waiting import wait_for

Event = dict[str, Any]


def wait_for_event(api_url: str, event: str, **payload: Any) -> Event:
    """The newest event of this name whose payload has these values. AssertionError if there is none in time."""
    asked = {"filter": {"event": {"name": [event]}}, "limit": 50}

    def newest() -> Event | None:
        answer = httpx.post(f"{api_url}/events/filter", json=asked, timeout=30).raise_for_status().json()
        fitting = (one for one in answer["events"] if payload.items() <= one["payload"].items())
        return next(fitting, None)

    return wait_for(newest, f"an event {event} with {payload}", 0.5)
