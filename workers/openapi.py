"""What /openapi.json says beyond the models: examples, streamed answers, refusals and the bearer token."""

from typing import Any

from fastapi import FastAPI

from workers.api import BundleChange, ErrorAnswer, GenerationRequest
from workers.events import CompletedEvent, PartialImageEvent, ProgressEvent

REFUSALS = {
    400: ("a field that cannot be used", "weights.colour", "unknown basis name 'colour': use one of colourfulness"),
    401: ("no token, or one that is not known", None, "this endpoint needs a token"),
    403: ("a token that is not for this", None, "the token of alice is not for this: it needs the scope admin"),
    404: ("a model or an evaluation that does not exist", "model", 'there is no model "sd"; use one of sprites'),
    408: ("the deadline passed", None, "the deadline passed before the images were ready"),
    409: ("it cannot be changed to that", None, "the bundle could not be loaded; the old one keeps serving"),
    413: ("the body is too large", None, "the body is larger than 65536 bytes"),
    415: ("the body is not JSON", None, 'send the body as JSON, with "Content-Type: application/json"'),
    429: ("too much work is waiting", None, "the queue is full: 19.8 s of work are waiting, of at most 20 s"),
    431: ("the headers are too large", None, "101 headers; at most 100 are read"),
    503: ("no engine can answer now", None, "no engine replica can take requests right now"),
}
STATUS_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait, by forecast.", "schema": {"type": "integer"}}}
STREAM_EXAMPLE = (
    'event: blend.progress\ndata: {"type": "blend.progress", "step": 0, "total": 20}\n\n'
    'event: image_generation.completed\ndata: {"type": "image_generation.completed", "b64_json": "...", "seed": 7}\n\n'
)
DEADLINE_HEADER = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds after which the answer is of no use: it is then given up, or refused at once.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
    "example": 30,
}


def _refusal(status: int) -> dict[str, Any]:
    meaning, param, message = REFUSALS[status]
    example = {"error": {"message": message, "type": STATUS_TYPES.get(status, "invalid_request_error"), "param": param}}
    return {
        "model": ErrorAnswer,
        "description": meaning[0].upper() + meaning[1:] + ".",
        "content": {"application/json": {"example": example}},
        **({"headers": RETRY_AFTER} if status in (429, 503) else {}),
    }


def _body(model: type[BundleChange] | type[GenerationRequest]) -> dict[str, Any]:
    # as a component: a request body read by hand is not known to FastAPI
    return {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}


ERRORS: dict[int | str, dict[str, Any]] = {status: _refusal(status) for status in REFUSALS}
GENERATION: dict[str, Any] = {
    "responses": {
        **ERRORS,
        200: {
            "description": "The images, at once; with `stream` as server-sent events.",
            "content": {
                "application/json": {
                    "example": {
                        "created": 1764288000,
                        "data": [{"b64_json": "iVBORw0KGgo...", "seed": 7}],
                        "bundle": {"name": "sprites", "version": 2, "digest": "57e6bab6..."},
                        "weights": {"colourfulness": 0.7, "compressibility": 0.3},
                        "kl_lambda": 1.0,
                        "method": "mpa",
                        "usage": {"rows": 80, "steps": 20, "queue_ms": 0.4, "denoise_ms": 310.2, "decode_ms": 4.1},
                    }
                },
                "text/event-stream": {"schema": {"type": "string"}, "example": STREAM_EXAMPLE},
            },
        },
    },
    "openapi_extra": {"requestBody": _body(GenerationRequest), "parameters": [DEADLINE_HEADER]},
}
BUNDLE_CHANGE: dict[str, Any] = {"responses": ERRORS, "openapi_extra": {"requestBody": _body(BundleChange)}}


def describe(app: FastAPI) -> None:
    """Add to the document what FastAPI cannot see: the token, and the events of a stream."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            components = document.setdefault("components", {})
            components["securitySchemes"] = {
                "token": {"type": "http", "scheme": "bearer", "description": "Where the endpoint has a token file."}
            }
            for event in (ProgressEvent, PartialImageEvent, CompletedEvent):
                schema = event.model_json_schema(ref_template="#/components/schemas/{model}")
                components["schemas"].update(schema.pop("$defs", {}))
                components["schemas"][event.__name__] = schema
            for path, item in document["paths"].items():
                if path.startswith("/v1/"):
                    for operation in item.values():
                        # {}: an endpoint without a token file asks for none
                        operation["security"] = [{"token": []}, {}]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
