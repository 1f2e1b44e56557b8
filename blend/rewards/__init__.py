"""Rewards: functions of a batch of images and their prompts that a basis adapter is tuned toward.

`load_reward(name)` gives one by name. A reward is deterministic and scores each image by itself, whatever its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class RewardError(ValueError):
    """A reward that does not exist, or images it cannot score."""


@runtime_checkable
class Reward(Protocol):
    """One scalar per image; higher is better."""

    name: str
    version: str
    range: tuple[float, float]
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1] made from B prompts; returns float32 [B]."""
        ...


def _colourfulness() -> Reward:
    from blend.rewards.colourfulness import Colourfulness

    return Colourfulness()


def _compressibility() -> Reward:
    from blend.rewards.compressibility import Compressibility

    return Compressibility()


def _brightness() -> Reward:
    from blend.rewards.brightness import Brightness

    return Brightness()


def _alignment() -> Reward:
    from blend.rewards.alignment import Alignment

    return Alignment.shipped()


_FACTORIES: dict[str, Callable[[], Reward]] = {
    "colourfulness": _colourfulness,
    "compressibility": _compressibility,
    "brightness": _brightness,
    "alignment": _alignment,
}
REWARDS = tuple(_FACTORIES)


def load_reward(name: str) -> Reward:
    """The reward of that name; RewardError names the known ones."""
    if name not in _FACTORIES:
        raise RewardError(f"unknown reward {name!r}; choose one of {', '.join(REWARDS)}")
    return _FACTORIES[name]()


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what is not a batch of RGB images in [0, 1] with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise RewardError(f"images have shape {tuple(images.shape)}; a reward needs [B, 3, H, W]")
    if len(prompts) != len(images):
        raise RewardError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt per image")
