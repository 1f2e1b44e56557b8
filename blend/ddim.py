"""One DDIM step for rows that each stand at their own timestep.

Free functions over tensors: no scheduler object, no state. diffusers' DDIMScheduler is the oracle in the tests.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")
MIN_STD = 1e-4  # below this a transition counts as deterministic: it has no density and no KL


class DDIMStep(NamedTuple):
    """What one step hands back."""

    prev_sample: Tensor  # [R, ...] x_{t-1}
    mean: Tensor  # [R, ...] mean of x_{t-1} given x_t
    std: Tensor  # [R] standard deviation of x_{t-1} given x_t; 0 where the step is deterministic
    log_prob: Tensor  # [R] log density of prev_sample, AVERAGED over its elements
    origin: Tensor  # [R, ...] predicted x_0, clamped where the model's schedule asks for it


def ddim_step(
    noise_pred: Tensor,
    sample: Tensor,
    timesteps: Tensor,
    prev_timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: Tensor | float,
    noise: Tensor | None,
    prediction_type: str,
    final_alpha_cumprod: Tensor | float,
    clip_sample_range: float | None = None,
) -> DDIMStep:
    """Take one step of DDIM, equations (12) and (16) of arXiv 2010.02502, each row at its own timestep.

    noise_pred, sample, noise: [R, ...]; timesteps, prev_timesteps: [R] long; alphas_cumprod: [N]; eta: [R] or a
    number in [0, 1]. A prev_timestep below 0 ends the chain and uses final_alpha_cumprod, [R] or one number. noise=None
    returns the mean as prev_sample. clip_sample_range clamps the predicted x_0 (None: no clamp). All in float32.
    """
    ones = [-1, *[1] * (sample.dim() - 1)]
    sample, noise_pred = sample.float(), noise_pred.float()
    alphas = alphas_cumprod.to(sample.device, torch.float32)
    final = torch.as_tensor(final_alpha_cumprod, dtype=torch.float32, device=sample.device)
    alpha = alphas[timesteps]
    alpha_prev = torch.where(prev_timesteps >= 0, alphas[prev_timesteps.clamp(min=0)], final)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    # rounding may leave a variance a hair below zero where alpha equals alpha_prev
    std = torch.as_tensor(eta, dtype=torch.float32, device=sample.device) * variance.clamp(min=0).sqrt()

    root_alpha, root_beta = alpha.sqrt().view(ones), (1 - alpha).sqrt().view(ones)
    if prediction_type == "epsilon":
        origin = (sample - root_beta * noise_pred) / root_alpha
        direction = noise_pred
    elif prediction_type == "v_prediction":
        origin = root_alpha * sample - root_beta * noise_pred
        direction = root_alpha * noise_pred + root_beta * sample
    else:
        raise ValueError(f"prediction_type is {prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")
    if clip_sample_range is not None:
        origin = origin.clamp(-clip_sample_range, clip_sample_range)

    remaining = (1 - alpha_prev - std**2).clamp(min=0).sqrt()
    mean = alpha_prev.sqrt().view(ones) * origin + remaining.view(ones) * direction
    prev_sample = mean if noise is None else mean + std.view(ones) * noise
    return DDIMStep(prev_sample, mean, std, log_prob_of(prev_sample.detach(), mean, std), origin)


def log_prob_of(prev_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return [R] the Gaussian log density of prev_sample, AVERAGED over its elements (as DDPO and DPOK do).

    prev_sample, mean: [R, ...]; std: [R]. A row with std < MIN_STD has no density: its log_prob is the constant 0,
    so that a ratio over it is 1 and no gradient flows.
    """
    random = std >= MIN_STD
    # a masked std, not a masked result: the gradient of an unused 0/0 would still be NaN
    scale = torch.where(random, std, torch.ones_like(std))
    squared = ((prev_sample - mean) ** 2).flatten(1).mean(1)
    log_prob = -squared / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(random, log_prob, torch.zeros_like(log_prob))


def kl_of(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """Return [R] KL(N(mean, std^2) || N(other_mean, std^2)) in nats, AVERAGED over elements; 0 where std < MIN_STD.

    mean, other_mean: [R, ...]; std: [R]. Summed over the steps of a trajectory and multiplied by the number of
    latent elements it is the path KL.
    """
    random = std >= MIN_STD
    scale = torch.where(random, std, torch.ones_like(std))
    squared = ((mean - other_mean) ** 2).flatten(1).mean(1)
    return torch.where(random, squared / (2 * scale**2), torch.zeros_like(squared))
