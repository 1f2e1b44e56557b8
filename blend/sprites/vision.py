"""The small convolutional image encoder that the judge and the alignment reward each train for themselves."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from blend.sprites.captions import COLOURS, OBJECTS, Thing


class ImageEncoder(nn.Module):
    """Images [B, 3, 64, 64] in [0, 1] to features [B, width]; position is kept on a 4 x 4 grid."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _stage(3, 24),
            _stage(24, 48),
            _stage(48, 96),
            _stage(96, 96),
            nn.Flatten(),
            nn.Linear(96 * 16, width),
            nn.SiLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.trunk(images * 2 - 1)
        return features


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


def save_half(module: nn.Module, path: Path) -> None:
    """Write a module's weights in half precision."""
    save_file({name: tensor.detach().half().contiguous() for name, tensor in module.state_dict().items()}, path)


def load_half(module: nn.Module, path: Path) -> None:
    """Read what `save_half` wrote into a float32 module of the same shape."""
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})


def any_things(rng: random.Random, *, pair_share: float) -> tuple[Thing, ...]:
    """One or two things of any colour and object, held-out pairs included: what a judge must know."""
    names = rng.sample(OBJECTS, 2 if rng.random() < pair_share else 1)
    return tuple(Thing(rng.choice(COLOURS), name) for name in names)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] with the blur, noise and colour shifts of imperfect samples, each at random strength."""
    count, _, height, width = images.shape
    small = functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = functional.interpolate(small, size=(height, width), mode="bilinear")
    share = torch.rand(count, 1, 1, 1, generator=generator)
    mixed = torch.lerp(images, blurred, share)
    coarse = torch.randn(count, 3, height // 8, width // 8, generator=generator)
    stains = functional.interpolate(coarse, size=(height, width), mode="bilinear")
    strength = 0.06 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.04 * torch.rand(count, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    return (mixed + strength * stains + noise).clamp(0, 1)
