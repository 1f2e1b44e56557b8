"""PNG files that say how they were made.

Every fact is one text chunk of its own, named as in the request, so that any PNG viewer shows it. Texts are
stored verbatim, everything else as JSON; `read_facts` gives back exactly what `encode_png` was given.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, ValidationError

SOFTWARE = "diffusion-blend"


class ImageFacts(BaseModel):
    """Everything that decides an image's pixels: with the same bundle, a replay gives the same image."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str
    negative_prompt: str
    seed: int
    weights: dict[str, float]
    kl_lambda: float
    method: str
    num_inference_steps: int
    guidance_scale: float
    eta: float
    width: int
    height: int
    bundle: str
    bundle_digest: str


class ImageFactsError(ValueError):
    """A file that is no PNG of ours."""


def encode_png(pixels: np.ndarray, facts: ImageFacts | None = None) -> bytes:
    """PNG of `pixels` uint8 [H, W, 3] with one text chunk per fact; a preview has none, it cannot be made again."""
    chunks = PngInfo()
    chunks.add_text("Software", SOFTWARE)
    for name, value in facts.model_dump().items() if facts is not None else ():
        text = value if isinstance(value, str) else json.dumps(value)
        # iTXt, because tEXt holds Latin-1 alone.
        chunks.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_facts(source: bytes | Path) -> ImageFacts:
    """The facts in a PNG (its bytes or its path). ImageFactsError when it has none."""
    stream = io.BytesIO(source) if isinstance(source, bytes) else io.BytesIO(source.read_bytes())
    try:
        with Image.open(stream) as image:
            image.load()
            chunks = {str(name): str(text) for name, text in image.info.items()}
    except OSError as error:
        raise ImageFactsError(f"not an image that can be read: {error}") from None
    if chunks.get("Software") != SOFTWARE:
        raise ImageFactsError(f"no facts of {SOFTWARE} in this image; was it re-encoded?")
    texts = {name for name, field in ImageFacts.model_fields.items() if field.annotation is str}
    try:
        found = {
            name: chunks[name] if name in texts else json.loads(chunks[name])
            for name in ImageFacts.model_fields
            if name in chunks
        }
        return ImageFacts.model_validate(found)
    except (ValidationError, json.JSONDecodeError) as error:
        raise ImageFactsError(f"the facts in this image are damaged: {error}") from None


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images float [B, 3, H, W] in [0, 1] as uint8 [B, H, W, 3], rounded as diffusers does."""
    return (np.clip(images, 0.0, 1.0).transpose(0, 2, 3, 1) * 255.0).round().astype(np.uint8)
