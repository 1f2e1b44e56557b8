"""`workers.routes.Backend` over a Serve deployment handle: the one place where trouble between processes is met.

A replica that is lost under a request costs the client nothing but time: the request, whose seed is fixed by then, is
sent again and makes the same images.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from workers.api import Caller, GenerationRequest, GenerationResponse, Health, Refusal
from workers.events import Event, PartialImageEvent, ProgressEvent
from workers.latest_evaluation import LatestEvaluation
from workers.model_card import ModelCard
from workers.routes import unavailable

log = logging.getLogger(__name__)

# A replica dies, and its successor too: the request is likely to be the cause.
ATTEMPTS = 2
SWITCH_TIMEOUT_S = 300.0
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
        from workers.deploying import change_bundle

        found = await self._ask("resolve", bundle)
        if isinstance(found, Refusal):
            return found
        try:
            await asyncio.to_thread(change_bundle, bundle)
            async with asyncio.timeout(SWITCH_TIMEOUT_S):
                return await self._switched(bundle, found)
        except TimeoutError:
            return unavailable(f"{bundle} is still being loaded after {SWITCH_TIMEOUT_S:g} s; see /readyz")

    async def _switched(self, bundle: str, ref: str) -> Health | Refusal:
        while True:
            told: list[Health | Refusal] = []
            # while a replica takes its new configuration over, there is none to broadcast to
            with contextlib.suppress(RayServeException):
                told = await self._engine.broadcast("standing", bundle, ref).results_async()
            if told and all(isinstance(one, Health) and one.status == "ready" for one in told):
                return told[0]
            refused = [one for one in told if isinstance(one, Refusal)]
            if refused:
                return refused[0]
            await asyncio.sleep(0.2)

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
    facts = {"seed": request.seed, "attempt": attempt, "reason": type(error).__name__}
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
