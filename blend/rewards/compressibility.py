"""Compressibility as in DDPO (Black et al., "Training diffusion models with reinforcement learning", 2023)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from blend.rewards import check_images

_QUALITY = 95


class Compressibility:
    """Minus the size in kilobytes (1,000 bytes) of the JPEG of quality 95; no prompt is used."""

    name = "compressibility"
    version = "1"
    range = (-float("inf"), 0.0)
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
        return torch.tensor([-_jpeg_bytes(picture) / 1000 for picture in pixels.permute(0, 2, 3, 1).cpu()])


def _jpeg_bytes(picture: Tensor) -> int:
    """Bytes of one uint8 [H, W, 3] picture as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.tell()
