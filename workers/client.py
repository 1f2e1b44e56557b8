"""Asks a running endpoint over HTTP; its refusals arrive as `RequestError` with the server's own words."""

from typing import TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from workers.api import ErrorAnswer, GenerationRequest, GenerationResponse, Refusal, RequestError
from workers.model_card import ModelCard, ModelList

Answer = TypeVar("Answer")
TIMEOUT = httpx.Timeout(600.0, connect=5.0)


def request_images(url: str, request: GenerationRequest) -> GenerationResponse:
    """POST `request` to the endpoint at `url`. RequestError if it refuses, ConnectionError if it is not there."""
    body = request.model_dump(mode="json", exclude_defaults=True)
    return _exchange("POST", f"{_base(url)}/v1/images/generations", GenerationResponse, body)


def request_card(url: str) -> ModelCard:
    """The card of the bundle served at `url`."""
    return _exchange("GET", f"{_base(url)}/v1/models", ModelList).data[0]


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _exchange(method: str, url: str, kind: type[Answer], body: object = None) -> Answer:
    try:
        reply = httpx.request(method, url, json=body, timeout=TIMEOUT)
    except httpx.InvalidURL as error:
        raise ConnectionError(f"{url} is not a URL: {error}") from None
    except httpx.HTTPError as error:
        message = f"no answer from {url}: {error or type(error).__name__}; start one with `diffusion-blend serve`"
        raise ConnectionError(message) from None
    try:
        if reply.is_success:
            return TypeAdapter(kind).validate_json(reply.content)
        detail = ErrorAnswer.model_validate_json(reply.content).error
    except ValidationError:
        raise ConnectionError(f"{url} answered {reply.status_code}, but not as a Diffusion Blend endpoint") from None
    raise RequestError(Refusal(status=reply.status_code, message=detail.message, type=detail.type, param=detail.param))
