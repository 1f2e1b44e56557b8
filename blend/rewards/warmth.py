"""Warmth of the colours: Ou, Luo, Woodcock and Wright, "A study of colour emotion and colour preference. Part I"
(Color Research and Application 29, 2004), which fits what observers call warm and cool to CIELAB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blend.rewards import check_images

# The 95th percentile over rendered sprites scenes: beyond it everything turns orange, objects too, so the reward is
# flat there.
SATURATION = 0.22
# linear sRGB to CIE XYZ (IEC 61966-2-1); divided by its row sums, the white of sRGB (D65) is 1, 1, 1
_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_WARMEST_HUE = math.radians(50)


class Warmth:
    """Mean over the pixels of -0.5 + 0.02 C^1.07 cos(h - 50 degrees), saturated at SATURATION; no prompt is used.

    C is chroma and h hue in CIELAB. Grey is -0.5, blue-green the coolest with -1.66, red the warmest with 2.35.
    """

    name = "warmth"
    version = "1"
    range = (-1.7, SATURATION)
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        return warmth(images).clamp(max=SATURATION)


def warmth(images: Tensor) -> Tensor:
    """Unsaturated warmth of images [B, 3, H, W] in [0, 1]; returns float32 [B]."""
    a, b = opponents(images.float())
    # C^1.07 cos(h - 50) is C^0.07 times a projection; the small number gives grey a gradient
    toward = a * math.cos(_WARMEST_HUE) + b * math.sin(_WARMEST_HUE)
    return (0.02 * (a.square() + b.square() + 1e-4).pow(0.035) * toward - 0.5).mean((1, 2))


def opponents(images: Tensor) -> tuple[Tensor, Tensor]:
    """CIELAB a* and b*, each [B, H, W], of sRGB images [B, 3, H, W] in [0, 1]."""
    # clamped on either side of the bend: the branch that is not taken must have a gradient too
    power = ((images.clamp(min=0.04045) + 0.055) / 1.055).pow(2.4)
    linear = torch.where(images <= 0.04045, images / 12.92, power)
    matrix = images.new_tensor(_XYZ)
    xyz = torch.einsum("ij,bjhw->bihw", matrix / matrix.sum(1, keepdim=True), linear)
    bend = 6 / 29
    root = xyz.clamp(min=bend**3).pow(1 / 3)
    x, y, z = torch.where(xyz > bend**3, root, xyz / (3 * bend**2) + 4 / 29).unbind(1)
    return 500 * (x - y), 200 * (y - z)
