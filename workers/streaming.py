"""Server-sent events over ASGI, given up as soon as the client has left. Knows nothing of images."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from workers.api import Refusal
from workers.events import Event

T = TypeVar("T")


class ClientLeftError(Exception):
    """The client closed the connection before its answer was ready."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it as soon as the client has left (ClientLeftError). The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for pending in (task, gone):
            pending.cancel()
        for pending in (task, gone):
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Answers with `first` and then `rest`.

    A Refusal in place of an event becomes an `error` event, the last one; `on_refusal` hears of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: Event, rest: AsyncIterator[Event | Refusal], on_refusal: Callable[[Refusal], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with contextlib.suppress(ClientLeftError):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": encode_event(self._first), "more_body": True})
        async with contextlib.aclosing(self._rest) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Refusal):
                    self._on_refusal(event)
                await send({"type": "http.response.body", "body": encode_event(event), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def first_event(request: Request, events: AsyncIterator[Event | Refusal]) -> Event | Refusal:
    """What a stream begins with, as long as the client is there."""

    async def begin() -> Event | Refusal:
        return await anext(events)

    return await while_connected(request.receive, begin())


def encode_event(event: Event | Refusal) -> bytes:
    """One event in the format of the HTML standard (section 9.2)."""
    if isinstance(event, Refusal):
        return f"event: error\ndata: {json.dumps(event.event())}\n\n".encode()
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
