"""Contrast after Peli, "Contrast in complex images" (JOSA A 7, 1990): how far light and dark lie apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blend.rewards import check_images
from blend.rewards.brightness import luma

# The 95th percentile over rendered sprites scenes: beyond it come posters of black and white, so the reward is flat.
SATURATION = 0.25


class Contrast:
    """Root-mean-square contrast of the luma, saturated at SATURATION (the most there is is 0.5); no prompt is used."""

    name = "contrast"
    version = "1"
    range = (0.0, SATURATION)
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        return contrast(images).clamp(max=SATURATION)


def contrast(images: Tensor) -> Tensor:
    """Unsaturated standard deviation of the luma of images [B, 3, H, W] in [0, 1]; returns float32 [B]."""
    # the root of zero has no gradient
    return (luma(images).var((1, 2), correction=0) + 1e-8).sqrt()
