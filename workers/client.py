"""Asks a running endpoint over HTTP; its refusals arrive as `RequestError` with the server's own words."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from workers.api import ErrorAnswer, GenerationRequest, GenerationResponse, Health, Refusal, RequestError
from workers.events import CompletedEvent
from workers.model_card import ModelCard, ModelList

Answer = TypeVar("Answer")
TIMEOUT = httpx.Timeout(600.0, connect=5.0)
TOKEN_VARIABLE = "DIFFUSION_BLEND_TOKEN"


def request_images(url: str, request: GenerationRequest, token: str | None = None) -> GenerationResponse:
    """POST `request` to the endpoint at `url`. RequestError if it refuses, ConnectionError if it is not there.

    `token`: for endpoints that want one; None: the environment's DIFFUSION_BLEND_TOKEN, if set.
    """
    body = request.model_dump(mode="json", exclude_defaults=True)
    return _exchange("POST", f"{_base(url)}/v1/images/generations", GenerationResponse, body, token)


def stream_images(
    url: str,
    request: GenerationRequest,
    on_step: Callable[[int, int], None],
    token: str | None = None,
) -> list[CompletedEvent]:
    """The same, with `on_step` told (steps done, steps in all) on the way; one event for each image."""
    body = request.model_dump(mode="json", exclude_defaults=True) | {"stream": True}
    target, images = f"{_base(url)}/v1/images/generations", []
    with _told(target), httpx.stream("POST", target, json=body, headers=_headers(token), timeout=TIMEOUT) as reply:
        if not reply.is_success:
            reply.read()
            raise _refusal(reply)
        for kind, data in _events(reply):
            if kind == "blend.progress":
                on_step(data["step"], data["total"])
            elif kind == "image_generation.completed":
                images.append(CompletedEvent.model_validate(data))
            elif kind == "error":
                detail = ErrorAnswer.model_validate(data).error
                raise RequestError(Refusal(status=503, **detail.model_dump()))
    if not images:
        raise ConnectionError(f"{target} ended the answer before an image was ready; send the request again")
    return images


def request_card(url: str, token: str | None = None) -> ModelCard:
    """The card of the bundle served at `url`."""
    return _exchange("GET", f"{_base(url)}/v1/models", ModelList, None, token).data[0]


def request_bundle(url: str, bundle: str, token: str | None = None) -> Health:
    """Have the endpoint at `url` serve another bundle; return once it does. Needs a token of scope admin."""
    return _exchange("POST", f"{_base(url)}/v1/admin/bundle", Health, {"bundle": bundle}, token)


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _headers(token: str | None) -> dict[str, str]:
    token = token or os.environ.get(TOKEN_VARIABLE)
    return {"Authorization": f"Bearer {token}"} if token else {}


def _exchange(method: str, url: str, kind: type[Answer], body: object, token: str | None) -> Answer:
    with _told(url):
        reply = httpx.request(method, url, json=body, headers=_headers(token), timeout=TIMEOUT)
    if not reply.is_success:
        raise _refusal(reply)
    try:
        return TypeAdapter(kind).validate_json(reply.content)
    except ValidationError:
        raise _stranger(reply) from None


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What goes wrong on the way, in one sentence with a remedy."""
    try:
        yield
    except httpx.InvalidURL as error:
        raise ConnectionError(f"{url} is not a URL: {error}") from None
    except httpx.HTTPError as error:
        message = f"no answer from {url}: {error or type(error).__name__}; start one with `diffusion-blend serve`"
        raise ConnectionError(message) from None


def _events(reply: httpx.Response) -> Iterator[tuple[str, dict[str, object]]]:
    kind = ""
    for line in reply.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            kind = value
        elif field == "data":
            yield kind, json.loads(value)


def _refusal(reply: httpx.Response) -> Exception:
    try:
        detail = ErrorAnswer.model_validate_json(reply.content).error
    except ValidationError:
        return _stranger(reply)
    message = detail.message
    if reply.status_code == 401:
        message += f"; set {TOKEN_VARIABLE}, or give --token"
    return RequestError(Refusal(status=reply.status_code, message=message, type=detail.type, param=detail.param))


def _stranger(reply: httpx.Response) -> ConnectionError:
    return ConnectionError(f"{reply.request.url} answered {reply.status_code}, but not as a Diffusion Blend endpoint")
