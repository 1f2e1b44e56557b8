"""Brightness: how much light a picture holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blend.rewards import check_images

# Rec. 601 luma, as in JPEG
_LUMA = (0.299, 0.587, 0.114)
# The 95th percentile over rendered sprites scenes: beyond it a picture only washes out, so the reward is flat there.
SATURATION = 0.83


class Brightness:
    """Mean Rec. 601 luma in [0, 1], saturated at SATURATION; no prompt is used."""

    name = "brightness"
    version = "1"
    range = (0.0, SATURATION)
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        return brightness(images).clamp(max=SATURATION)


def brightness(images: Tensor) -> Tensor:
    """Unsaturated mean luma of images [B, 3, H, W] in [0, 1]; returns float32 [B]."""
    return luma(images).mean((1, 2))


def luma(images: Tensor) -> Tensor:
    """Luma of every pixel of images [B, 3, H, W] in [0, 1]; returns float32 [B, H, W] in [0, 1]."""
    return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1).float()
