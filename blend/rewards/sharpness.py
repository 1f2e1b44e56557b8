"""Sharpness as focus is measured: Tenengrad (Krotkov, "Focusing", IJCV 1, 1987), the energy of Sobel gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blend.rewards import RewardError, check_images
from blend.rewards.brightness import luma

# The 95th percentile over rendered sprites scenes: beyond it grain is added and no edge, so the reward is flat there.
# For the same reason it is a mean of squares: it takes much grain to weigh as much as one strong edge.
SATURATION = 0.11


class Sharpness:
    """Root of the mean Tenengrad of the luma, saturated at SATURATION; no prompt is used.

    In luma per pixel, hence of pictures of one size only; images of fewer than 3 x 3 pixels are refused.
    """

    name = "sharpness"
    version = "1"
    range = (0.0, SATURATION)
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        if min(images.shape[2:]) < 3:
            raise RewardError(
                f"images of {images.shape[3]} x {images.shape[2]} pixels have no edges; use 3 x 3 or more"
            )
        return sharpness(images).clamp(max=SATURATION)


def sharpness(images: Tensor) -> Tensor:
    """Unsaturated root-mean-square Sobel gradient of images [B, 3, H, W] in [0, 1]; returns float32 [B]."""
    light = luma(images)
    across, down = _slope(light), _slope(light.transpose(1, 2)).transpose(1, 2)
    # the root of zero has no gradient
    return ((across.square() + down.square()).mean((1, 2)) + 1e-8).sqrt()


def _slope(light: Tensor) -> Tensor:
    """Sobel's rise from left to right, per pixel: [B, H, W] to [B, H - 2, W - 2]."""
    rise = (light[:, :, 2:] - light[:, :, :-2]) / 2
    return (rise[:, :-2] + 2 * rise[:, 1:-1] + rise[:, 2:]) / 4
