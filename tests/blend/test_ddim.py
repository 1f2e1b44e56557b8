"""The vectorised DDIM step against diffusers' scheduler and torch's distributions."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from blend.ddim import MIN_STD, ddim_step, kl_of, log_prob_of

SHAPE = (4, 8, 8)


def make_scheduler(**options) -> DDIMScheduler:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**config, **options})


def draw(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample, pred, noise = (torch.randn(rows, *SHAPE, generator=generator) for _ in range(3))
    return sample, pred, noise


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"set_alpha_to_one": True},
        {"set_alpha_to_one": True, "steps_offset": 0},
        {"steps_offset": 0},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 2.5},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_the_step_equals_diffusers_at_every_timestep_at_once(eta, prediction_type, options):
    scheduler = make_scheduler(prediction_type=prediction_type, **options)
    steps = 7
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    sample, pred, noise = draw(len(timesteps), seed=3)
    taken = ddim_step(
        pred,
        sample,
        timesteps,
        (timesteps - 1000 // steps).clamp(min=-1),
        scheduler.alphas_cumprod,
        eta=eta,
        noise=noise,
        prediction_type=prediction_type,
        final_alpha_cumprod=scheduler.final_alpha_cumprod,
        clip_sample_range=scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
    )
    for i, timestep in enumerate(timesteps):
        one = slice(i, i + 1)
        expected = scheduler.step(pred[one], timestep, sample[one], eta=eta, variance_noise=noise[one]).prev_sample
        torch.testing.assert_close(taken.prev_sample[one], expected, rtol=1e-5, atol=1e-5)


def test_every_row_has_its_own_eta():
    scheduler = make_scheduler()
    sample, pred, noise = draw(3, seed=1)
    timesteps, prev_timesteps = torch.tensor([901, 501, 1]), torch.tensor([801, 401, -1])
    fixed = {"prediction_type": "epsilon", "final_alpha_cumprod": scheduler.final_alpha_cumprod}
    etas = torch.tensor([0.0, 0.3, 1.0])
    together = ddim_step(
        pred, sample, timesteps, prev_timesteps, scheduler.alphas_cumprod, eta=etas, noise=noise, **fixed
    )
    assert together.std[0] == 0
    for i in range(3):
        one = slice(i, i + 1)
        alone = ddim_step(
            pred[one],
            sample[one],
            timesteps[one],
            prev_timesteps[one],
            scheduler.alphas_cumprod,
            eta=float(etas[i]),
            noise=noise[one],
            **fixed,
        )
        assert torch.equal(together.prev_sample[one], alone.prev_sample)


def test_log_prob_is_the_gaussian_density_averaged_over_elements():
    mean, prev_sample = torch.randn(2, 5, *SHAPE, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.1, 0.5, 1.0, 2.0, 0.02])
    expected = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(prev_sample).flatten(1).mean(1)
    torch.testing.assert_close(log_prob_of(prev_sample, mean, std), expected)


def test_kl_is_the_divergence_of_two_gaussians_averaged_over_elements():
    mean, other = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.1, 0.5, 2.0])
    wide = std.view(-1, 1, 1, 1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, wide), torch.distributions.Normal(other, wide)
    )
    torch.testing.assert_close(kl_of(mean, other, std), expected.flatten(1).mean(1))


def test_replaying_a_step_gives_ratio_one():
    scheduler = make_scheduler()
    sample, pred, noise = draw(2, seed=5)
    args = (pred, sample, torch.tensor([801, 401]), torch.tensor([601, 201]), scheduler.alphas_cumprod)
    fixed = {"eta": 1.0, "prediction_type": "epsilon", "final_alpha_cumprod": scheduler.final_alpha_cumprod}
    taken = ddim_step(*args, noise=noise, **fixed)
    replayed = ddim_step(*args, noise=None, **fixed)
    assert torch.equal(replayed.prev_sample, replayed.mean)
    assert torch.equal(log_prob_of(taken.prev_sample, replayed.mean, replayed.std), taken.log_prob)


@pytest.mark.parametrize("std_of_first", [0.0, MIN_STD / 2])
def test_a_deterministic_row_has_no_density_and_no_nan_gradient(std_of_first):
    mean = torch.zeros(2, *SHAPE, requires_grad=True)
    std = torch.tensor([std_of_first, 1.0])
    prev_sample = torch.ones(2, *SHAPE)
    log_prob = log_prob_of(prev_sample, mean, std)
    (log_prob.sum() + 2 * kl_of(mean, prev_sample, std).sum()).backward()
    assert log_prob[0] == 0
    assert mean.grad is not None
    assert torch.equal(mean.grad[0], torch.zeros(SHAPE))
    assert mean.grad[1].abs().sum() > 0
    assert mean.grad.isfinite().all()


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"'sample'.*epsilon, v_prediction"):
        ddim_step(
            *draw(1, 0)[:2],
            torch.tensor([1]),
            torch.tensor([-1]),
            make_scheduler().alphas_cumprod,
            eta=1.0,
            noise=None,
            prediction_type="sample",
            final_alpha_cumprod=1.0,
        )
