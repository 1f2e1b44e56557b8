"""RGG, reward gradient guidance: the base's noise prediction, pushed along the reward's gradient at every step.

The law tilted by exp(s r) has the score of p plus grad log E[exp(s r(x_0)) | x_t]; with Tweedie's prediction in place
of the mean over x_0 (arXiv 2209.14687) that is

    g = grad_{x_t} r(D(x_0-hat(x_t))),    eps' = eps - s lambda_k sqrt(1 - alpha-bar_t) g

through decoder, guided prediction and UNet, and eps' takes the DDIM step. s is 1 / alpha of the KL-regularised
objective. lambda_k = min((1 + gamma)^k - 1, 1) tempers: early predictions of x_0 are blurred and their gradients
mislead (arXiv 2501.05803).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blend.baselines.found import Cost, Found
from blend.baselines.walk import Walk
from blend.engine import BlendEngine, DenoisingError, Sample
from blend.model import DiffusionModel
from blend.rewards import Reward, RewardError

_TEMPERED_STEPS = 50  # the number of steps that gamma is stated for


@torch.no_grad()
def reward_guided(
    engine: BlendEngine,
    samples: Sequence[Sample],
    reward: Reward,
    *,
    scale: float,
    tempering: float | None = 0.024,
    normalise: bool = False,
    tile_rows: int = 24,
) -> list[Found]:
    """Return RGG's image for each sample of the base model; scores are empty, since none decides anything.

    scale: s >= 0, in 1 / (units of the reward); tempering: gamma, None for lambda = 1. normalise takes g at the norm of
    eps, |eps| g / |g|, so that a scale means the same for every reward, step and image size. tile_rows bounds the rows
    that are differentiated at once. A sample whose latents end not finite has an error in their place. Samples must be
    alike but for prompts and seeds (see Walk). Raises RewardError for a reward without a gradient, SampleError, and
    ValueError for other numbers.
    """
    check_differentiable(reward)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale is {scale}: use a finite number >= 0")
    if tempering is not None and not (math.isfinite(tempering) and tempering > 0):
        raise ValueError(f"tempering is {tempering}: use a finite number > 0, or None")
    if not samples:
        return []
    walk = Walk(engine, samples, tile_rows=tile_rows)
    latents = walk.begin()
    for step in range(walk.total):
        noise_pred, gradient = reward_gradient(engine.model, walk, latents, step, reward)
        push = scale * tempered(step, walk.total, tempering) * (1 - walk.alpha_cumprod(step)) ** 0.5
        if normalise:
            gradient = _at_norm_of(noise_pred, gradient)
        latents = walk.advance(noise_pred - push * walk.noise_to_prediction(step) * gradient, latents, step)
    rows = sum(walk.rows(step) for step in range(walk.total))
    cost = Cost(rows, decodes=walk.total, gradients=rows)
    return [_found(*one, scale, cost) for one in zip(samples, latents, strict=True)]


def _found(sample: Sample, latents: Tensor, scale: float, cost: Cost) -> Found:
    if latents.isfinite().all():
        return Found(sample, latents, torch.empty(0), cost)
    error = DenoisingError(f"the guided sample with seed {sample.seed} is not finite: lower scale ({scale:g})")
    return Found(sample, None, torch.empty(0), cost, error)


def reward_gradient(
    model: DiffusionModel, walk: Walk, latents: Tensor, step: int, reward: Reward
) -> tuple[Tensor, Tensor]:
    """Return the guided prediction and g = grad_{x_t} r(D(x_0-hat(x_t))), both [S, C, h, w], for x_t [S, C, h, w].

    A pixel that the decoder's output leaves [0, 1] at, and a reward that is saturated, give no gradient.
    """
    prompts, preds, gradients = walk.prompts(len(latents)), [], []
    for part in torch.arange(len(latents)).split(max(1, walk.tile_rows // walk.rows(step))):
        with torch.enable_grad():
            x = latents[part.to(latents.device)].detach().requires_grad_()
            noise_pred = walk.predict(x, step, part)
            images = model.decode_traced(walk.origin(noise_pred, x, step))
            scores = reward(images, [prompts[i] for i in part.tolist()])
            (gradient,) = torch.autograd.grad(scores.sum(), x)
        preds.append(noise_pred.detach())
        gradients.append(gradient)
    return torch.cat(preds), torch.cat(gradients)


def tempered(step: int, steps: int, gamma: float | None) -> float:
    """Return lambda_k = min((1 + gamma)^k - 1, 1) of a step, k counted as if there were 50 of them, from 1 on.

    Our departure: counted so, the same share of the way is tempered whatever the number of steps.
    """
    if gamma is None:
        return 1.0
    return min((1 + gamma) ** (_TEMPERED_STEPS * (step + 1) / steps) - 1, 1.0)


def check_differentiable(reward: Reward) -> None:
    """Raise RewardError, naming what is to blame, for a reward without a gradient."""
    if not reward.differentiable:
        blamed = ", ".join(getattr(reward, "undifferentiable", [reward.name]))
        raise RewardError(
            f"{blamed} has no gradient to be guided by: leave it out, or search with best_of_n or blockwise, which"
            " need none"
        )


def _at_norm_of(noise_pred: Tensor, gradient: Tensor) -> Tensor:
    ones = [-1, *[1] * (gradient.dim() - 1)]
    norms = [torch.linalg.vector_norm(t.flatten(1).float(), dim=1) for t in (noise_pred, gradient)]
    # where the reward is flat, as at a saturated image, there is no direction, and none is made up
    return gradient * (norms[0] / norms[1]).masked_fill(norms[1] == 0, 0.0).view(ones)
