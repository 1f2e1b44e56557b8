"""What every HTTP request passes before the routes and every answer after them.

Request ids, caps on headers and on requests at once, bearer tokens, security headers, one log line and the request
metrics. Plain ASGI, so that streams and disconnects reach the routes as they are.
"""

import logging
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette._utils import get_route_path
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.api import Refusal
from workers.metrics import Metrics
from workers.tokens import Tokens

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16_384
MAX_HEADERS = 100
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(slots=True)
class Access:
    """One request as the guard sees it; in `request.state.access` for the routes, which may add facts to the log."""

    request_id: str
    client: str
    facts: dict[str, object] = field(default_factory=dict)
    # how a stream ended whose answer had begun as a 200
    outcome: int | None = None

    def refused(self, refusal: Refusal) -> None:
        """What was begun ends with an error."""
        self.outcome = refusal.status


class Guard:
    """ASGI middleware. `tokens` None: everyone may ask for images and no one may change the bundle.

    `echo_ids` False: what stands before it sends a client's own request id back.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens | None,
        max_concurrent: int,
        metrics: Metrics,
        echo_ids: bool = True,
    ) -> None:
        self._app = app
        self._echo_ids = echo_ids
        self._tokens = tokens
        self._max_concurrent = max_concurrent
        self._metrics = metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, whole = time.perf_counter(), CLIENT_LEFT, False
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        access = Access(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, _address(scope))
        sent_id = None if access.request_id == given and not self._echo_ids else access.request_id
        scope.setdefault("state", {})["access"] = access

        async def answer(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _with_headers(message["headers"], sent_id)
            elif not message.get("more_body"):
                whole = True
            await send(message)

        self._running += 1
        self._metrics.in_flight(self._running)
        try:
            refusal = self._refuse(scope, headers, access)
            if refusal is None:
                await self._app(scope, receive, answer)
            else:
                await answer_of(refusal)(scope, receive, answer)
        except Exception as error:
            log.error("request_failed", exc_info=error, extra={"facts": {"request_id": access.request_id}})
            access.outcome = 500
            if status != CLIENT_LEFT:
                raise  # an answer had begun
            message = "the service failed; its log says why"
            await answer_of(Refusal(status=500, message=message, type="server_error"))(scope, receive, answer)
        finally:
            self._running -= 1
            self._metrics.in_flight(self._running)
            self._note(scope, access, access.outcome or (status if whole else CLIENT_LEFT), time.perf_counter() - began)

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes], access: Access) -> Refusal | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES or len(scope["headers"]) > MAX_HEADERS:
            return Refusal(
                status=431,
                message=f"{len(scope['headers'])} headers of {size} bytes; at most {MAX_HEADERS} of "
                f"{MAX_HEADER_BYTES} bytes are read",
            )
        # as the router sees it: under a route prefix or a proxy's root path the scope has the whole path
        path = get_route_path(scope)
        if not path.startswith("/v1/"):
            return None
        if self._running > self._max_concurrent:
            return Refusal(
                status=429,
                message=f"{self._max_concurrent} requests are being answered already, which is the limit",
                type="rate_limit_error",
                retry_after_s=1,
            )
        return self._authorise("admin" if path.startswith("/v1/admin/") else "images", headers, access)

    def _authorise(self, scope: str, headers: dict[bytes, bytes], access: Access) -> Refusal | None:
        if self._tokens is None:
            if scope == "images":
                return None
            message = "no tokens are configured, so no one is an administrator: start the endpoint with --tokens FILE"
            return Refusal(status=403, message=message, type="permission_error")
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        entry = self._tokens.find(token.strip()) if kind.lower() == "bearer" else None
        if entry is None:
            message = 'this endpoint needs a token: send "Authorization: Bearer TOKEN" with one that it knows'
            return Refusal(status=401, message=message, type="authentication_error")
        access.client = entry.name
        if scope not in entry.scopes:
            message = f"the token of {entry.name} is not for this: it needs the scope {scope}"
            return Refusal(status=403, message=message, type="permission_error")
        return None

    def _note(self, scope: Scope, access: Access, status: int, seconds: float) -> None:
        route = _route(scope)
        self._metrics.request(route=route, status=status, seconds=seconds)
        log.info(
            "request",
            extra={
                "facts": {
                    "request_id": access.request_id,
                    "client": access.client,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 4),
                    **access.facts,
                }
            },
        )


def answer_of(refusal: Refusal) -> JSONResponse:
    """The error as every client gets it."""
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)


def _address(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else "unknown"


def _route(scope: Scope) -> str:
    """The route by its own name, also of what was refused before it was looked for: clients cannot invent values."""
    if (found := getattr(scope.get("route"), "path", None)) is not None:
        return str(found)
    known = {getattr(route, "path", None) for route in scope["app"].routes} if "app" in scope else set()
    path = get_route_path(scope)
    return path if path in known else "other"


def _with_headers(headers: Iterable[tuple[bytes, bytes]], request_id: str | None) -> list[tuple[bytes, bytes]]:
    added = SECURITY_HEADERS if request_id is None else {**SECURITY_HEADERS, "X-Request-ID": request_id}
    return [*headers, *((name.lower().encode(), value.encode()) for name, value in added.items())]
