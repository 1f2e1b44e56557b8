"""Policy objectives as pure functions of log-probabilities, advantages and KL. They know no model.

The trained objective is J = E[r] / s - alpha * KL(path), with s the reward's standard deviation under the base
and alpha = `kl_weight`. A transition's log_prob and KL enter as means over the D latent elements: the policy term
and the KL term are both 1/D of the gradient of J, so alpha multiplies the path KL in nats (summed over elements
and steps) whatever D is. KL gradients are taken at the visited states, as in DPOK: the effect of a step on the KL
of later steps is left out. The last, all but deterministic steps count in the KL alone (policy.REWARDED_STD).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blend.ddim import kl_of


def transition_kl(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussian DDIM transitions of equal std, averaged over elements: [N, C, h, w] -> [N].

    KL(N(mu, s^2) || N(mu_base, s^2)) = |mu - mu_base|^2 / (2 s^2); std [N] must be positive.
    """
    return kl_of(mean, base_mean, std)


def dpok_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """- A clip(ratio, 1 - c, 1 + c), per transition [N]. DPOK (arXiv 2305.16381), as used by Diffusion Blend.

    log_prob is a mean over latent elements, so the ratio is the D-th root of the density ratio.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)


def ppo_clip_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) [N]. PPO (1707.06347), as in DDPO (2305.13301)."""
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


PolicyLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """A policy loss and the baseline it goes with ("value", "running" or "group": see advantages.py)."""

    policy_loss: PolicyLoss
    baseline: str

    @property
    def needs_groups(self) -> bool:
        """Whether the baseline compares several images of one prompt."""
        return self.baseline == "group"


OBJECTIVES = {
    "dpok": Objective(dpok_loss, "value"),
    "ddpo": Objective(ppo_clip_loss, "running"),
    "grpo": Objective(ppo_clip_loss, "group"),
}


def regularised_loss(policy_loss: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """Per-transition loss [N]: policy term + kl_weight * KL, both averaged over latent elements."""
    return policy_loss + kl_weight * kl
