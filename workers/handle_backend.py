"""`workers.routes.Backend` over a Serve deployment handle: the one place where trouble between processes is met.

A replica that is lost under a request costs the client nothing but time: the request, whose seed is fixed by then, is
sent again and makes the same images.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from workers.api import Caller, GenerationRequest, GenerationResponse, Health, Refusal, unavailable
from workers.deploying import ServingError, change_bundle, wait_until_served
from workers.events import Event, PartialImageEvent, ProgressEvent
from workers.latest_evaluation import LatestEvaluation
from workers.model_card import ModelCard

log = logging.getLogger(__name__)

# A replica dies, and its successor too: the request is likely to be the cause.
ATTEMPTS = 2
LOST = unavailable("the engine replica was lost while it worked on this request; send it again")


class HandleBackend:
    """Asks the replicas behind `engine`."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    async def card(self) -> ModelCard | Refusal:
        return await self._ask("card")

    async def evaluation(self) -> LatestEvaluation | Refusal:
        return await self._ask("evaluation")

    async def readiness(self) -> Health | Refusal:
        return await self._ask("readiness")

    async def generate(self, request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal:
        return await self._ask("generate", request, caller)

    async def stream(self, request: GenerationRequest, caller: Caller) -> AsyncIterator[Event | Refusal]:
        told: set[tuple[str, int, int]] = set()
        for attempt in range(1, ATTEMPTS + 1):
            events = self._engine.options(stream=True).stream.remote(request, caller)
            try:
                async for event in events:
                    # after a loss the same events come once more, from the first one on
                    if (key := _key(event)) not in told:
                        told.add(key)
                        yield event
                return
            except RayActorError as error:
                caller = _lost(error, request, caller, attempt)
            except (BackPressureError, RayServeException) as error:
                yield _not_taken(error)
                return
            finally:
                events.cancel()
        yield LOST

    async def switch(self, bundle: str) -> Health | Refusal:
        """Make every replica, and every later one, serve `bundle`; return when they do or one could not."""
        found = await self._ask("resolve", bundle)
        if isinstance(found, Refusal):
            return found
        try:
            await asyncio.to_thread(change_bundle, bundle)
        except ServingError as error:
            return Refusal(status=409, message=str(error))
        return await asyncio.to_thread(wait_until_served, bundle, found)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            response = getattr(self._engine, method).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                # Awaiting was given up here; the replica must give up as well.
                response.cancel()
                raise
            except RayActorError as error:
                if method == "generate":
                    arguments = (arguments[0], _lost(error, *arguments, attempt))
            except (BackPressureError, RayServeException) as error:
                return _not_taken(error)
        return LOST


def _lost(error: RayActorError, request: GenerationRequest, caller: Caller, attempt: int) -> Caller:
    facts = {"request_id": caller.request_id, "seed": request.seed, "attempt": attempt, "reason": type(error).__name__}
    log.warning("replica_lost", extra={"facts": facts})
    return caller.model_copy(update={"admitted": True})


def _not_taken(error: Exception) -> Refusal:
    log.warning("no engine replica took the request: %s", error)
    return unavailable("no engine replica can take requests right now")


def _key(event: Event | Refusal) -> tuple[str, int, int]:
    match event:
        case ProgressEvent():
            return event.type, event.step, 0
        case PartialImageEvent():
            return event.type, event.image_index, event.partial_image_index
        case Refusal():
            return "error", 0, 0
    return event.type, event.image_index, 0
