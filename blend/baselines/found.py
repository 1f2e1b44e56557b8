"""What a search or a guided walk hands back, and what it spent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blend.engine import DenoisingError, Sample
from blend.rewards import Reward, start_scoring


@dataclass(frozen=True, slots=True)
class Cost:
    """What one image cost, in the units that dominate it."""

    rows: int  # UNet rows run forward
    decodes: int  # latents decoded, each scored once
    gradients: int = 0  # UNet rows run backward; each decode is then differentiated too


@dataclass(frozen=True, slots=True)
class Found:
    """One image, as latents."""

    sample: Sample  # what was asked for; its seed is the chosen candidate's
    latents: Tensor | None  # [C, h, w] float32; None where the sample failed
    scores: Tensor  # [N] the last rewards that were compared, in the order of the candidates; empty for guidance
    cost: Cost
    error: DenoisingError | None = None  # why there are no latents

    @property
    def score(self) -> float:
        """The reward of `latents`, NaN where none was computed."""
        return float(self.scores.max()) if len(self.scores) and self.error is None else float("nan")


def candidate_seeds(seed: int, n: int) -> list[int]:
    """Return n different seeds, the first of them `seed`; each depends on (seed, its place) alone."""
    return [seed, *(random.Random(f"candidate-{seed}-{place}").getrandbits(63) for place in range(1, n))]


def score_images(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return scores [B] on the CPU, -inf where an image or its score is not finite: such a candidate never wins."""
    scores = start_scoring(reward, images, prompts)()
    sound = scores.isfinite() & images.isfinite().flatten(1).all(1).cpu()
    return torch.where(sound, scores, torch.full_like(scores, -torch.inf))


def failure(scores: Tensor, seed: int) -> DenoisingError | None:
    """Return the error of a sample none of whose candidates is finite, by its scores [N]; None where one is."""
    if bool((scores > -torch.inf).any()):
        return None
    return DenoisingError(f"no candidate of the sample with seed {seed} is finite: lower guidance_scale or kl_lambda")


def check_count(n: object, name: str) -> None:
    """Raise ValueError unless n is an integer >= 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{name} is {n!r}: use an integer >= 1")
