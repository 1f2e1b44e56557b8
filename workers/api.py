"""What crosses the wire: the request, the answer, the model card and the errors. Knows neither torch nor Ray.

The image route is OpenAI's (`POST /v1/images/generations`); preferences and sampler settings ride at top
level. Only what can be told from a request's own text is judged here; what depends on the bundle (basis names,
sizes, prompt tokens) is judged by `workers.generation.plan` where that bundle is loaded.
"""

import json
import secrets
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from workers.model_card import MAX_IMAGES, MAX_PROMPT_CHARS, MAX_STEPS, BundleName

MAX_BODY_BYTES = 65_536
# OpenAI allows 3; a slow model has more to show.
MAX_PARTIAL_IMAGES = 10
# Every seed must survive a JSON client that keeps numbers as doubles.
MAX_SEED = 2**53 - 1

Name = Annotated[str, Field(min_length=1, max_length=128)]


class Refusal(BaseModel):
    """Why a request was not served: an HTTP status and what the client needs to put it right."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, dict[str, str | int | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param}}

    def event(self) -> dict[str, dict[str, str | int | None]]:
        """The body that ends a stream, with what would have been the header Retry-After of an answer."""
        wait = {} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}
        return {"error": {**self.body()["error"], **wait}}


def unavailable(message: str, retry_after_s: int = 5) -> Refusal:
    """The service cannot answer now and may soon: send the request again."""
    return Refusal(status=503, message=message, type="unavailable_error", retry_after_s=retry_after_s)


def draw_seed() -> int:
    """A seed for a request without one; short enough to be typed."""
    return secrets.randbelow(2**32)


class RequestError(ValueError):
    """A request that cannot be served; `refusal` says why. Survives pickle."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    def __str__(self) -> str:
        return self.refusal.message


def bad_request(param: str | None, message: str) -> RequestError:
    return RequestError(Refusal(status=400, message=message, param=param))


class GenerationRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "prompt": "A red colored car.",
                    "weights": {"colourfulness": 0.7, "compressibility": 0.3},
                    "kl_lambda": 1.0,
                    "seed": 7,
                }
            ]
        },
    )
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS, description="What to draw.")
    model: Name | None = Field(None, description="Bundle name as listed by /v1/models; default: the one served.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Images; they use seed, seed + 1, ...")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description='"WIDTHxHEIGHT" in pixels; default: the model\'s own size.',
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="PNG, base64-encoded.")
    stream: bool = Field(False, description="Answer as server-sent events: progress, previews, then the images.")
    partial_images: int = Field(0, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each image; needs stream.")
    weights: dict[Name, FiniteFloat] | None = Field(
        None,
        max_length=64,
        description="Preference over the basis: non-negative, sums to 1. Default: see /v1/models.",
    )
    kl_lambda: FiniteFloat | None = Field(None, description="0: base model; 1: as tuned; above 1: extrapolated.")
    method: str | None = Field(None, max_length=32, description="How adapters are blended, e.g. mpa, ls or soup.")
    normalize: bool = Field(False, description="Divide the weights by their sum instead of refusing them.")
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARS, description="What to steer away from.")
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Denoising steps.")
    guidance_scale: FiniteFloat | None = Field(None, ge=0.0, le=50.0, description="1 switches guidance off.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Seed of the first image; drawn when missing.")

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("must contain something other than white space")
        return prompt

    @field_validator("partial_images")
    @classmethod
    def _previews_are_streamed(cls, count: int, info: ValidationInfo) -> int:
        if count and not info.data.get("stream"):
            raise ValueError('previews need "stream": true; send it, or leave partial_images out')
        return count

    def with_seed(self) -> "GenerationRequest":
        """The same request with its seed drawn, if it has none: whoever answers it makes the same images."""
        return self if self.seed is not None else self.model_copy(update={"seed": draw_seed()})


class Caller(BaseModel):
    """Who asks, and until when it is worth answering."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # of the HTTP request, for the logs
    request_id: str | None = None
    # shares the engine fairly with the other clients
    client: str = "local"
    # seconds from now after which the answer is of no use; None: no limit
    deadline_s: float | None = None
    # taken in once already, by a replica that was lost: not to be turned away now
    admitted: bool = False


ANYONE = Caller()


class BundleChange(BaseModel):
    """Body of `POST /v1/admin/bundle`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra={"examples": [{"bundle": "sprites@2"}]}
    )
    bundle: Name = Field(pattern=r"^[A-Za-z0-9._@-]+$", description='"NAME@VERSION" or "NAME@ALIAS"; never a URL.')


class ImageData(BaseModel):
    b64_json: str
    seed: StrictInt


class Usage(BaseModel):
    """Work done: `rows` are UNet rows over all images; times are wall milliseconds of the whole request."""

    rows: int
    steps: int
    queue_ms: float
    denoise_ms: float
    decode_ms: float


class GenerationResponse(BaseModel):
    """OpenAI's answer plus what was used to make it."""

    created: int
    data: list[ImageData]
    bundle: BundleName
    weights: dict[str, float]
    kl_lambda: float
    method: str
    usage: Usage


class ErrorDetail(BaseModel):
    """`retry_after_s` only in an event that ends a stream; elsewhere it is the header Retry-After."""

    message: str
    type: str
    param: str | None = None
    retry_after_s: int | None = None


class ErrorAnswer(BaseModel):
    """Body of every 4xx and 5xx."""

    error: ErrorDetail


class Health(BaseModel):
    """Body of /healthz and /readyz. `warning`: it serves, but not what it was last told to."""

    status: str
    bundle: BundleName | None = None
    warning: str | None = None


def read_request(body: bytes) -> GenerationRequest:
    """Parse a JSON body. RequestError names the first field at fault."""
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error) from None


def read_bundle_change(body: bytes) -> BundleChange:
    """Parse a JSON body. RequestError names the first field at fault."""
    try:
        return BundleChange.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error, BundleChange) from None


def check_fields(fields: dict[str, Any]) -> GenerationRequest:
    """The same judgement for a request made in this process (the command line)."""
    try:
        return GenerationRequest.model_validate(fields)
    except ValidationError as error:
        raise refusal_of(error) from None


def refusal_of(error: ValidationError, model: type[BaseModel] = GenerationRequest) -> RequestError:
    """The first finding of pydantic as one sentence with field, value and remedy."""
    finding = error.errors(include_url=False)[0]
    kind, location = finding["type"], [str(part) for part in finding["loc"] if part != "[key]"]
    param = ".".join(location) or None
    if kind == "json_invalid":
        return bad_request(None, f"the body is not valid JSON: {finding['ctx']['error']}")
    if param is None:
        return bad_request(None, f"the body must be a JSON object, not {shorten(finding['input'])}")
    if kind == "extra_forbidden":
        allowed = ", ".join(model.model_fields)
        return bad_request(param, f"unknown field {shorten(location[-1])}; allowed fields: {allowed}")
    if kind == "missing":
        return bad_request(param, f"{param} is required")
    reason = _REASONS.get((param, kind)) or finding["msg"].removeprefix("Value error, ")
    value = "" if kind in ("string_too_long", "too_long") else f" (got {shorten(finding['input'])})"
    return bad_request(param, f"{shorten(param, quote=False)}: {reason[:1].lower() + reason[1:]}{value}")


_REASONS = {
    ("size", "string_pattern_mismatch"): 'must be "WIDTHxHEIGHT" in pixels, for example "64x64", or "auto"',
    ("response_format", "literal_error"): 'only "b64_json" is supported',
}


def shorten(value: object, *, quote: bool = True, limit: int = 80) -> str:
    """A client's value for an error message: JSON where possible, never more than `limit` characters."""
    if not quote:
        text = str(value)
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = cast(str, repr(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"
