"""What Prefect's automations are told: a bundle was registered, an evaluation ended well or badly.

Telling never ends the work that is told of. infra/prefect.yaml and infra/automations.yaml react to these events.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.manifests import BundleRecord

REGISTERED = "diffusion-blend.bundle.registered"
FINISHED = "diffusion-blend.evaluation.finished"
REGRESSED = "diffusion-blend.evaluation.regressed"
SECONDS = 5.0

log = logging.getLogger(__name__)


def resource(ref: str) -> dict[str, str]:
    """What an event is about: one resource per name of a bundle, for events may be matched by it."""
    return {"prefect.resource.id": f"diffusion-blend.bundle.{ref.partition('@')[0]}", "prefect.resource.name": ref}


def registration(record: "BundleRecord", store_url: str) -> dict[str, str]:
    """Payload of REGISTERED. A version that was there already is told again: a retry must not lose the event."""
    return {"ref": record.ref, "digest": record.digest, "store": store_url}


def emit(event: str, ref: str, payload: Mapping[str, Any], related: Sequence[Mapping[str, str]] = ()) -> None:
    """Tell of a bundle from inside a flow run, to whatever server the run has."""
    from prefect.events import emit_event

    try:
        emit_event(event, resource=resource(ref), payload=dict(payload), related=[dict(one) for one in related])
    except Exception as error:
        log.warning("%s of %s was not told to Prefect: %s: %s", event, ref, type(error).__name__, error)


def announce(event: str, ref: str, payload: Mapping[str, Any]) -> bool:
    """Tell of a bundle from the command line, if a server is configured; whether it heard.

    It is asked once, for SECONDS at most: `emit` would start a server where none is configured, and hold the process
    up where none answers.
    """
    if not _may_be_configured():
        return False
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return False
    try:
        asyncio.run(_send(event, ref, payload))
    except Exception as error:
        log.warning("%s of %s was not told to %s: %s: %s", event, ref, url, type(error).__name__, error)
        return False
    return True


async def _send(event: str, ref: str, payload: Mapping[str, Any]) -> None:
    from prefect.events import Event, get_events_client

    # what it says of a server that is not there is said here in one line
    logging.getLogger("prefect.events.clients").addFilter(lambda record: record.levelno > logging.WARNING)
    async with asyncio.timeout(SECONDS), get_events_client(reconnection_attempts=0, checkpoint_every=1) as client:
        await client.emit(Event(event=event, resource=resource(ref), payload=dict(payload)))


def _may_be_configured() -> bool:
    """False where no server can be configured, without the second that importing Prefect takes."""
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    files = (os.environ.get("PREFECT_PROFILES_PATH"), home / "profiles.toml", "prefect.toml", ".env")
    known = "prefect" in sys.modules or "PREFECT_API_URL" in os.environ
    return known or any(path and Path(path).is_file() for path in files)
