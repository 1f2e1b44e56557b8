"""The HTTP face: routes, body limits and errors, over any `Backend`.

It knows neither torch nor Ray, so the same application runs in an ingress replica and in a test client.
Whatever goes wrong leaves as {"error": {"message", "type", "param"}}; causes inside are logged, never sent.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from workers.api import (
    MAX_BODY_BYTES,
    ErrorAnswer,
    GenerationRequest,
    GenerationResponse,
    Health,
    Refusal,
    RequestError,
    read_request,
)
from workers.model_card import ModelCard, ModelList

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 10.0
CLIENT_LEFT = 499
T = TypeVar("T")


class Backend(Protocol):
    """What stands behind the routes. A Refusal is an answer; an exception is a defect."""

    async def card(self) -> ModelCard: ...

    async def generate(self, request: GenerationRequest) -> GenerationResponse | Refusal: ...

    async def readiness(self) -> Health | Refusal: ...


class ClientLeftError(Exception):
    """The client closed the connection before its answer was ready."""


def create_http(backend: Backend) -> FastAPI:
    """The application over `backend`."""
    app = FastAPI(
        title="Diffusion Blend",
        version="1",
        description="Images for any preference over reward-tuned adapters.",
        # The interactive pages load scripts from elsewhere; the document itself stays at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    _add_error_handlers(app)

    @app.post(
        "/v1/images/generations",
        response_model=GenerationResponse,
        responses={code: {"model": ErrorAnswer} for code in (400, 404, 413, 415, 429, 503)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": GenerationRequest.model_json_schema()}},
            }
        },
    )
    async def generations(request: Request) -> Response:
        wanted = read_request(await _read_body(request))
        return _answer(await _while_connected(request, backend.generate(wanted)))

    @app.get("/v1/models", response_model=ModelList, responses={503: {"model": ErrorAnswer}})
    async def models() -> Response:
        card = await _in_time(backend.card())
        return _answer(card if isinstance(card, Refusal) else ModelList(data=[card]))

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        return _answer(Health(status="up"))

    @app.get("/readyz", response_model=Health, responses={503: {"model": ErrorAnswer}})
    async def readyz() -> Response:
        return _answer(await _in_time(backend.readiness()))

    return app


def unavailable(message: str, retry_after_s: int = 5) -> Refusal:
    return Refusal(status=503, message=message, type="unavailable_error", retry_after_s=retry_after_s)


def _answer(outcome: BaseModel) -> Response:
    if not isinstance(outcome, Refusal):
        return Response(outcome.model_dump_json(), media_type="application/json")
    headers = {} if outcome.retry_after_s is None else {"Retry-After": str(outcome.retry_after_s)}
    return JSONResponse(outcome.body(), status_code=outcome.status, headers=headers)


async def _in_time(work: Awaitable[T]) -> T | Refusal:
    try:
        return await asyncio.wait_for(work, READY_TIMEOUT_S)
    except TimeoutError:
        return unavailable(f"the engine has not answered within {READY_TIMEOUT_S:g} s; it may be starting")


async def _read_body(request: Request) -> bytes:
    """The request body, at most MAX_BODY_BYTES."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f'send the body as JSON, with "Content-Type: application/json" (got "{kind[:80]}")'
        raise RequestError(Refusal(status=415, message=message))
    too_large = Refusal(status=413, message=f"the body is larger than {MAX_BODY_BYTES} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise RequestError(too_large)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(too_large)
    return bytes(body)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it as soon as the client has left (ClientLeftError)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for pending in (task, gone):
            pending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _answer(error.refusal)

    @app.exception_handler(ClientLeftError)
    async def left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}; see /openapi.json"
        refusal = Refusal(status=error.status_code, message=message)
        return JSONResponse(refusal.body(), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        refusal = Refusal(status=500, message="the service failed; its log says why", type="server_error")
        return JSONResponse(refusal.body(), status_code=500)
