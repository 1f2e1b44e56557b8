"""The contract of a reward, to be run on one's own: `check_reward("name")` in a test of any framework.

Silent faults are what it looks for: a score that depends on what else is in the batch, on chance or on earlier calls
makes training noisy and figures irreproducible, and nothing else ever reports it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from blend.rewards import AsyncReward, Reward, RewardError, load_reward
from blend.rewards.plugins import fault

PROMPTS = (
    "A red colored car.",
    "A blue cup and a green cat.",
    "A yellow colored bird.",
    "A white boat and a red house.",
)
# lengths of the steps, in parts of the range of a pixel, one of which must raise a score along its own gradient
_STEPS = (0.003, 0.01, 0.03, 0.1)


class ContractError(RewardError):
    """A reward that breaks its contract; the message has a line per broken clause."""


def check_reward(
    reward: Reward | Callable[[], Reward] | str,
    *,
    images: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    size: int = 64,
    tolerance: float = 1e-5,
) -> Reward:
    """Check a reward by name, class, factory or instance, and return it; ContractError lists the broken clauses.

    images [B, 3, H, W] in [0, 1] and their B prompts, at least two: what to score, by default 16 pictures of `size`
    pixels from blank to noisy. `tolerance` is how far a score, or a gradient in parts of its largest value, may
    move with the rest of the batch. All but an instance is loaded twice: weights must not be left to chance.
    """
    images = probe_images(size) if images is None else images
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(images))] if prompts is None else list(prompts)
    if len(images) < 2 or len(images) != len(prompts):
        raise ValueError(f"{len(images)} images with {len(prompts)} prompts: give two or more, one prompt each")
    # a module draws the weights that its file then replaces
    with torch.random.fork_rng(devices=[]):
        found, build = _load(reward)
    name = getattr(found, "name", repr(found))
    if wrong := fault(found):
        raise ContractError(f"{name} is no reward: {wrong}")
    broken = _Check(found, build, images.detach(), prompts, tolerance).broken()
    if broken:
        raise ContractError("\n  - ".join([f"the reward {name!r} breaks its contract:", *broken]))
    return found


def probe_images(size: int) -> Tensor:
    """Pictures [16, 3, size, size] in [0, 1]: blank, soft, striped and noisy ones, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    blank = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0.4, 0.8]]).view(4, 3, 1, 1)
    soft = torch.rand(8, 3, 4, 4, generator=generator)
    # from nearly grey to full contrast: a reward that is flat above some value is still seen below it
    soft = 0.5 + (soft - 0.5) * torch.linspace(0.05, 1, 8).view(8, 1, 1, 1)
    stripes = (torch.arange(size) // 4 % 2).float().expand(1, 3, size, size)
    noise = torch.rand(3, 3, size, size, generator=generator) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    return torch.cat(
        [blank.expand(4, 3, size, size), functional.interpolate(soft, size, mode="bilinear"), stripes, noise]
    )


def _load(reward: Reward | Callable[[], Reward] | str) -> tuple[Reward, Callable[[], Reward] | None]:
    """The reward, and what makes another one like it where that is known."""
    if isinstance(reward, str):
        return load_reward(reward), lambda: load_reward(reward)
    # classes and functions have no name of this kind unless a class states it for its instances
    if isinstance(reward, type) or not hasattr(reward, "name"):
        build = cast(Callable[[], Reward], reward)
        return build(), build
    return cast(Reward, reward), None


class _Check:
    """One reward's answers to the probes, and what is wrong with them."""

    def __init__(
        self,
        reward: Reward,
        build: Callable[[], Reward] | None,
        images: Tensor,
        prompts: list[str],
        tolerance: float,
    ) -> None:
        self.reward, self.build = reward, build
        self.images, self.prompts, self.tolerance = images, prompts, tolerance

    def broken(self) -> list[str]:
        """A line per broken clause; none but the first where there are no scores to go on with."""
        before = torch.get_rng_state(), random.getstate()
        seen = self.images.clone()
        try:
            scores = self._score(seen, self.prompts)
            found = self._defined(scores)
            if not found:
                clauses = (self._values, self._repeats, self._neighbours, self._submits)
                found = [line for clause in clauses for line in clause(scores)]
                found += self._gradient() if self.reward.differentiable else []
        except Exception as error:
            return [f"it fails on valid images: {type(error).__name__}: {error}"]
        if not torch.equal(seen, self.images):
            found.append("it writes to the images it is given: copy them first")
        if not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate():
            found.append("it draws from, or seeds, the global random state: give it a generator of its own, or none")
        return found + self._refusals()

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return self.reward(images, prompts)

    def _defined(self, scores: Tensor) -> list[str]:
        count = len(self.prompts)
        if not isinstance(scores, Tensor) or scores.shape != (count,) or scores.dtype != torch.float32:
            told = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            return [f"shape: {count} images gave {told}, not float32 [{count}]"]
        undefined = ~torch.isfinite(scores)
        return [f"range: image {_first(undefined)} scores {scores[undefined][0]:g}"] if undefined.any() else []

    def _values(self, scores: Tensor) -> list[str]:
        low, high = self.reward.range
        outside = (scores < low - self.tolerance) | (scores > high + self.tolerance)
        if outside.any():
            place = _first(outside)
            return [f"range: image {place} scores {scores[place]:g}, outside {self.reward.range}"]
        if scores.unique().numel() == 1:
            return [f"it gives every image the same score, {scores[0]:g}: pass images= and prompts= it can tell apart"]
        return []

    def _repeats(self, scores: Tensor) -> list[str]:
        """The same batch again after another one, and again from a reward made anew."""
        self._score(1 - self.images, self.prompts[::-1])
        if not torch.equal(self._score(self.images.clone(), self.prompts), scores):
            return ["determinism: the same images score differently when asked again"]
        if self.build is not None:
            with torch.random.fork_rng(devices=[]):
                again = self.build()
            with torch.no_grad():
                if not torch.equal(again(self.images.clone(), self.prompts), scores):
                    return ["determinism: loaded again it scores differently: are all of its weights loaded?"]
        return []

    def _neighbours(self, scores: Tensor) -> list[str]:
        """Every image alone, and all of them in reverse order."""
        alone = [self._score(self.images[i : i + 1].clone(), [prompt]) for i, prompt in enumerate(self.prompts)]
        if any(score.shape != (1,) for score in alone):
            return [f"shape: an image alone gave {list(alone[0].shape)}, not [1]"]
        reverse = self._score(self.images.flip(0), self.prompts[::-1])
        for told, other in (("alone", torch.cat(alone)), ("in reverse order", reverse.flip(0))):
            moved = (other - scores).abs()
            if not (moved <= self.tolerance).all():
                place = int(moved.nan_to_num(torch.inf).argmax())
                return [
                    f"batch invariance: image {place} scores {other[place]:g} {told} and {scores[place]:g} in the batch"
                ]
        return []

    def _submits(self, scores: Tensor) -> list[str]:
        if isinstance(self.reward, AsyncReward):
            wait = self.reward.submit(self.images.clone(), self.prompts)
            if not torch.equal(wait(), scores):
                return ["submit: the scores are others than those of a call"]
        return []

    def _gradient(self) -> list[str]:
        """Finite, of the own image alone, and uphill for at least one image."""
        images = self.images.clone().requires_grad_(True)
        scores = self.reward(images, self.prompts)
        if not scores.requires_grad:
            return ["differentiable: the scores have no gradient; say differentiable = False"]
        [gradient] = torch.autograd.grad(scores.sum(), images, allow_unused=True)
        if gradient is None or not gradient.any():
            return ["differentiable: the gradient is zero for every image; say differentiable = False"]
        if not torch.isfinite(gradient).all():
            bad = ~torch.isfinite(gradient).flatten(1).all(1)
            return [f"differentiable: the gradient of image {_first(bad)} is not finite"]
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        place = int(largest.argmax())
        [others] = torch.autograd.grad(self.reward(images, self.prompts)[place], images)
        others[place] = 0
        if others.abs().max() > self.tolerance * largest.max():
            return [f"batch invariance: the score of image {place} has a gradient in other images"]
        largest.clamp_(min=torch.finfo(gradient.dtype).tiny)
        higher = (self._score((self.images + step * gradient / largest).clamp(0, 1), self.prompts) for step in _STEPS)
        if not any((stepped > scores.detach()).any() for stepped in higher):
            return ["differentiable: a step along the gradient raises no score"]
        return []

    def _refusals(self) -> list[str]:
        """A batch without its prompts, or an image that is none, must not get a score."""
        found = []
        for told, images, prompts in (
            (f"{len(self.images)} images with 1 prompt", self.images.clone(), self.prompts[:1]),
            ("one image without its batch dimension", self.images[0].clone(), self.prompts[:1]),
        ):
            try:
                self._score(images, prompts)
            except Exception:
                continue
            found.append(f"it scores {told}: call blend.rewards.check_images first")
        return found


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
