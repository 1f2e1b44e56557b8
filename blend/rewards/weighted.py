"""Several rewards as one number: what a rival that searches or guides maximises, and what an oracle is tuned toward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from blend.rewards import Reward, RewardError, start_scoring


class WeightedReward:
    """r(w) = sum_i w_i (r_i - mean_i) / sd_i: a Reward made of several, each in its own standard deviations.

    Unlike rewards need a common unit before weights mean anything; the blend needs none, since its adapters were tuned
    one by one. Means and standard deviations are given, never taken from the batch, so that an image's score does not
    depend on its neighbours: measure them once over images of the base model. A reward of weight 0 is never computed.
    """

    name = "weighted"
    version = "1"

    def __init__(
        self, rewards: Mapping[str, Reward], weights: Mapping[str, float], scales: Mapping[str, tuple[float, float]]
    ) -> None:
        """Take rewards, weights w_i >= 0 and scales (mean_i, sd_i > 0) by name; weights need not sum to 1.

        Raises RewardError for a weight without its reward or scale, and for numbers out of range.
        """
        if not any(weight > 0 for weight in weights.values()):
            raise RewardError(f"weights {dict(weights)} leave nothing to score: give at least one a positive value")
        self.weights = dict(weights)
        self.rewards: dict[str, Reward] = {}  # of a weight above 0
        self._terms: list[tuple[float, float]] = []  # factor and mean of each of them
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise RewardError(f"weights.{name} is {weight}: use a finite number >= 0")
            if weight == 0:
                continue
            for kind, known in (("reward", rewards), ("scale", scales)):
                if name not in known:
                    raise RewardError(f"{name!r} has a weight but no {kind}: those given are {', '.join(known)}")
            mean, sd = scales[name]
            if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
                raise RewardError(
                    f"the scale of {name} is {(mean, sd)}: use a finite mean and a standard deviation > 0"
                )
            self.rewards[name] = rewards[name]
            self._terms.append((weight / sd, mean))
        terms = list(zip(self.rewards.values(), self._terms, strict=True))
        bounds = [[factor * (reward.range[side] - mean) for reward, (factor, mean) in terms] for side in (0, 1)]
        self.range = (sum(bounds[0]), sum(bounds[1]))
        self.differentiable = not self.undifferentiable

    @property
    def undifferentiable(self) -> list[str]:
        """The names of the rewards in it that have no gradient."""
        return [reward.name for reward in self.rewards.values() if not reward.differentiable]

    def rescaled(self, scales: Mapping[str, tuple[float, float]]) -> WeightedReward:
        """Return the same mix with other means and standard deviations."""
        return WeightedReward(self.rewards, self.weights, scales)

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the mix [B] of its rewards' scores [B] by name."""
        terms = zip(self.rewards, self._terms, strict=True)
        return torch.stack([factor * (scores[name] - mean) for name, (factor, mean) in terms]).sum(0)

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Callable[[], Tensor]:
        """Begin to score; the returned function waits for the scores [B]. They carry no gradient."""
        waits = {name: start_scoring(reward, images, prompts) for name, reward in self.rewards.items()}
        return lambda: self.combine({name: wait() for name, wait in waits.items()})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine({name: reward(images, prompts).to(images.device) for name, reward in self.rewards.items()})
