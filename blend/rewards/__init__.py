"""Rewards: functions of a batch of images and their prompts that a basis adapter is tuned toward.

`load_reward(name)` gives one by name: a built-in one, or that of another package (blend.rewards.plugins). A reward is
deterministic and scores each image by itself, whatever its batch; blend.rewards.contract checks one. One that computes
elsewhere also has `submit`; `start_scoring` treats both kinds alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
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


@runtime_checkable
class AsyncReward(Protocol):
    """What a reward also has that computes elsewhere, while the caller goes on."""

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Callable[[], Tensor]:
        """Begin to score; the returned function waits for the scores [B] and raises what went wrong."""
        ...


@runtime_checkable
class MovableReward(Protocol):
    """What a reward also has that computes where it is put: images and scores may be on any device."""

    def to(self, device: str) -> Reward:
        """Move to a device and return itself."""
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


def _contrast() -> Reward:
    from blend.rewards.contrast import Contrast

    return Contrast()


def _sharpness() -> Reward:
    from blend.rewards.sharpness import Sharpness

    return Sharpness()


def _warmth() -> Reward:
    from blend.rewards.warmth import Warmth

    return Warmth()


def _alignment() -> Reward:
    from blend.rewards.alignment import Alignment

    return Alignment.shipped()


_FACTORIES: dict[str, Callable[[], Reward]] = {
    "colourfulness": _colourfulness,
    "compressibility": _compressibility,
    "brightness": _brightness,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "warmth": _warmth,
    "alignment": _alignment,
}
REWARDS = tuple(_FACTORIES)


def load_reward(name: str) -> Reward:
    """The reward of that name, built in or a plugin. RewardError names the known ones, or the package at fault."""
    from blend.rewards import plugins

    require_known(name)
    return _FACTORIES[name]() if name in _FACTORIES else plugins.load_plugin(plugins.plugins()[name])


def require_known(name: str) -> None:
    """Raise RewardError for a name that is neither built in nor a plugin's, or both; imports no plugin."""
    from blend.rewards import plugins

    if name in _FACTORIES:
        plugins.refuse_claims(name)
    elif name not in plugins.plugins():
        raise RewardError(
            f"unknown reward {name!r}; choose one of {', '.join(REWARDS)}; plugins: {plugins.described()}"
        )


def start_scoring(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Callable[[], Tensor]:
    """Begin to score images [B, 3, H, W]; the returned function gives float32 scores [B] on the CPU.

    A reward without `submit` is computed here and now. The scores carry no graph; RewardError when they are not [B].
    """
    if isinstance(reward, AsyncReward):
        wait = reward.submit(images, prompts)
        return lambda: _checked(reward, wait(), len(prompts))
    with torch.no_grad():
        scores = _checked(reward, reward(images, prompts), len(prompts))
    return lambda: scores


def _checked(reward: Reward, scores: Tensor, count: int) -> Tensor:
    if scores.shape != (count,):
        raise RewardError(f"{reward.name} gave scores of shape {tuple(scores.shape)} for {count} images")
    return scores.detach().float().cpu()


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what is not a batch of RGB images in [0, 1] with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise RewardError(f"images have shape {tuple(images.shape)}; a reward needs [B, 3, H, W]")
    if len(prompts) != len(images):
        raise RewardError(f"{len(images)} images came with {len(prompts)} prompts; give one prompt per image")
