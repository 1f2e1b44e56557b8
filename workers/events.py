"""What a streamed answer is made of, one server-sent event each; names and fields of images are OpenAI's.

`blend.progress` is ours. Knows neither torch nor Ray.
"""

from typing import Literal

from pydantic import BaseModel, StrictInt

from workers.api import GenerationResponse, Usage
from workers.model_card import BundleName


class ProgressEvent(BaseModel):
    """`step` of `total` denoising steps are done by every image of the request; 0 while it waits."""

    type: Literal["blend.progress"] = "blend.progress"
    step: int
    total: int


class Picture(BaseModel):
    """What OpenAI says of every streamed image. `b64_json`: a PNG; `image_index` counts the images of a request."""

    b64_json: str
    image_index: int
    created_at: int
    size: str
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class PartialImageEvent(Picture):
    """What one image would be by its latest step; smaller than the image where the decoder is large."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    step: int
    total: int


class CompletedEvent(Picture):
    """One finished image with what made it; `usage` is that of the whole request."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    seed: StrictInt
    bundle: BundleName
    weights: dict[str, float]
    kl_lambda: float
    method: str
    usage: Usage


Event = ProgressEvent | PartialImageEvent | CompletedEvent


def completed_events(answer: GenerationResponse, size: str) -> list[CompletedEvent]:
    """The events that end a stream: the answer, image by image."""
    shared = answer.model_dump(include={"bundle", "weights", "kl_lambda", "method", "usage"})
    return [
        CompletedEvent(
            b64_json=image.b64_json,
            image_index=index,
            created_at=answer.created,
            size=size,
            seed=image.seed,
            **shared,
        )
        for index, image in enumerate(answer.data)
    ]
