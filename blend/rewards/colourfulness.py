"""Colourfulness after Hasler and Suesstrunk, "Measuring colourfulness in natural images" (SPIE 2003)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blend.rewards import check_images

# Two of a hundred scenes are more colourful (tests/blend/test_rewards.py measures it again): beyond that a picture is
# not better, only garish, so the reward is flat there.
SATURATION = 1.25


class Colourfulness:
    """M3 / 100 = (sigma_rgyb + 0.3 mu_rgyb) / 100 on 8-bit values, saturated at SATURATION; no prompt is used."""

    name = "colourfulness"
    version = "2"  # 1 was flat from 1.1 on, less than two standard deviations above what the sprites base draws
    range = (0.0, SATURATION)
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        return colourfulness(images).clamp(max=SATURATION)


def colourfulness(images: Tensor) -> Tensor:
    """Unsaturated M3 / 100 of images [B, 3, H, W] in [0, 1]; returns float32 [B]."""
    red, green, blue = (images.float() * 255).flatten(2).unbind(1)
    red_green = red - green
    yellow_blue = 0.5 * (red + green) - blue
    spread = torch.sqrt(red_green.var(1, correction=0) + yellow_blue.var(1, correction=0) + 1e-8)
    offset = torch.sqrt(red_green.mean(1).square() + yellow_blue.mean(1).square() + 1e-8)
    return (spread + 0.3 * offset) / 100
