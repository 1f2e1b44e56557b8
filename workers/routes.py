"""The HTTP face: routes, body limits and errors, over any `Backend`.

It knows neither torch nor Ray, so the same application runs in an ingress replica and in a test client.
Whatever goes wrong leaves as {"error": {"message", "type", "param"}}; causes inside are logged, never sent.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from workers.api import (
    MAX_BODY_BYTES,
    Caller,
    GenerationRequest,
    GenerationResponse,
    Health,
    Refusal,
    RequestError,
    bad_request,
    read_bundle_change,
    read_request,
    unavailable,
)
from workers.engine_args import MAX_CONCURRENT
from workers.events import Event
from workers.guard import CLIENT_LEFT, Access, Guard, answer_of
from workers.latest_evaluation import LatestEvaluation
from workers.logs import audit
from workers.metrics import Metrics
from workers.model_card import ModelCard, ModelList
from workers.openapi import BUNDLE_CHANGE, ERRORS, GENERATION, describe
from workers.streaming import ClientLeftError, EventStream, first_event, while_connected
from workers.tokens import Tokens

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
READY_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 15.0
MAX_DEADLINE_S = 3_600.0
T = TypeVar("T")


class Backend(Protocol):
    """What stands behind the routes. A Refusal is an answer; an exception is a defect."""

    async def card(self) -> ModelCard | Refusal: ...

    async def generate(self, request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal: ...

    def stream(self, request: GenerationRequest, caller: Caller) -> AsyncIterator[Event | Refusal]: ...

    async def evaluation(self) -> LatestEvaluation | Refusal: ...

    async def switch(self, bundle: str) -> Health | Refusal: ...

    async def readiness(self) -> Health | Refusal: ...


def create_http(
    backend: Backend,
    *,
    tokens: Tokens | None = None,
    metrics: Metrics | None = None,
    max_concurrent: int = MAX_CONCURRENT,
    echo_ids: bool = True,
) -> FastAPI:
    """The application over `backend`; without tokens anyone may ask for images. `echo_ids` as in `Guard`."""
    app = FastAPI(
        title="Diffusion Blend",
        version="1",
        description="Images for any preference over reward-tuned adapters.",
        # The interactive pages load scripts from elsewhere; the document itself stays at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    _add_error_handlers(app)
    _add_images(app, backend)
    _add_facts(app, backend)
    _add_page(app)
    app.add_middleware(
        Guard,
        tokens=tokens,
        max_concurrent=max_concurrent,
        metrics=metrics or Metrics(),
        echo_ids=echo_ids,
    )
    describe(app)
    return app


def _add_images(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/images/generations", response_model=GenerationResponse, **GENERATION)
    async def generations(request: Request) -> Response:
        """Make images. With `stream` the answer is server-sent events: progress, previews, then each image."""
        access: Access = request.state.access
        wanted = read_request(await _read_body(request)).with_seed()
        access.facts |= {"images": wanted.n, "stream": wanted.stream}
        caller = Caller(client=access.client, request_id=access.request_id, deadline_s=_deadline(request))
        if not wanted.stream:
            return _answer(await while_connected(request.receive, backend.generate(wanted, caller)))
        events = backend.stream(wanted, caller)
        first = await first_event(request, events)
        return answer_of(first) if isinstance(first, Refusal) else EventStream(first, events, access.refused)

    @app.post("/v1/admin/bundle", response_model=Health, **BUNDLE_CHANGE)
    async def change_bundle(request: Request) -> Response:
        """Serve another bundle: `{"bundle": "NAME@VERSION"}`. Requests under way end on the bundle they began on."""
        access: Access = request.state.access
        bundle = read_bundle_change(await _read_body(request)).bundle
        outcome = await backend.switch(bundle)
        told = outcome.message if isinstance(outcome, Refusal) else "done"
        audit("change_bundle", actor=access.client, request_id=access.request_id, bundle=bundle, outcome=told)
        return _answer(outcome)


def _add_facts(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models", response_model=ModelList, responses=ERRORS)
    async def models() -> Response:
        """The bundle that is served: basis names, methods, ranges, defaults and limits."""
        card = await _in_time(backend.card())
        return _answer(card if isinstance(card, Refusal) else ModelList(data=[card]))

    @app.get("/v1/evaluations/latest", response_model=LatestEvaluation, responses=ERRORS)
    async def latest() -> Response:
        """What the bundle scored on held-out prompts, preference by preference, with 95 % intervals."""
        return _answer(await _in_time(backend.evaluation()))

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Whether this process answers at all."""
        return _answer(Health(status="up"))

    @app.get("/readyz", response_model=Health, responses=ERRORS)
    async def readyz() -> Response:
        """Whether images can be had now, and from which bundle."""
        return _answer(await _in_time(backend.readiness()))


def _add_page(app: FastAPI) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in PAGE_TYPES}

    def send(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "not found")
        path = files[name]
        return FileResponse(path, media_type=PAGE_TYPES[path.suffix], headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return send("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        return send(name)


def _answer(outcome: BaseModel) -> Response:
    if isinstance(outcome, Refusal):
        return answer_of(outcome)
    return Response(outcome.model_dump_json(), media_type="application/json")


async def _in_time(work: Awaitable[T]) -> T | Refusal:
    try:
        return await asyncio.wait_for(work, READY_TIMEOUT_S)
    except TimeoutError:
        return unavailable(f"the engine has not answered within {READY_TIMEOUT_S:g} s; it may be starting")


def _deadline(request: Request) -> float | None:
    """Seconds that the client will wait, from the header X-Request-Timeout."""
    text = request.headers.get("x-request-timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_DEADLINE_S:
        raise bad_request(None, f"X-Request-Timeout: use seconds from 0 to {MAX_DEADLINE_S:g} (got {text[:40]!r})")
    return seconds


async def _read_body(request: Request) -> bytes:
    """The request body, at most MAX_BODY_BYTES, within BODY_TIMEOUT_S."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f'send the body as JSON, with "Content-Type: application/json" (got "{kind[:80]}")'
        raise RequestError(Refusal(status=415, message=message))
    too_large = Refusal(status=413, message=f"the body is larger than {MAX_BODY_BYTES} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise RequestError(too_large)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise RequestError(too_large)
    except TimeoutError:
        late = Refusal(status=408, message=f"the body did not come within {BODY_TIMEOUT_S:g} s", type="timeout_error")
        raise RequestError(late) from None
    return bytes(body)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return answer_of(error.refusal)

    @app.exception_handler(ClientLeftError)
    async def left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}; see /openapi.json"
        refusal = Refusal(status=error.status_code, message=message)
        headers: dict[str, Any] = dict(error.headers or {})
        return JSONResponse(refusal.body(), status_code=error.status_code, headers=headers)
