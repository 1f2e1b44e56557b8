"""DPM-Solver++(2M) against diffusers' scheduler, over whole trajectories, and against a Gaussian's closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from blend.ddim import ddim_step, log_prob_of
from blend.mixing import draw_ls_schedule
from blend.solvers import dpmpp_timesteps, extrapolation, multistep

SHAPE = (4, 8, 8)
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SPACINGS = ("leading", "trailing", "linspace")
Model = Callable[[Tensor, Tensor], Tensor]


def make_scheduler(spacing: str, prediction_type: str = "epsilon", **options) -> DDIMScheduler:
    return DDIMScheduler(
        **CONFIG, timestep_spacing=spacing, prediction_type=prediction_type, clip_sample=False, **options
    )


def timesteps_of(scheduler: DDIMScheduler, steps: int) -> Tensor:
    return dpmpp_timesteps(
        steps,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        spacing=scheduler.config.timestep_spacing,
        offset=scheduler.config.steps_offset,
    )


def solve(
    model: Model,
    latents: Tensor,
    timesteps: Tensor,
    scheduler: DDIMScheduler,
    eta: float,
    noises: Tensor | None = None,
    second_order: bool = True,
) -> Tensor:
    """Return every latent [T + 1, R, ...] of a batch whose rows walk together; second_order=False is DDIM."""
    prev_timesteps = torch.cat([timesteps[1:], torch.tensor([-1])])
    factors = extrapolation(timesteps, scheduler.alphas_cumprod) * second_order
    path, origin = [latents], torch.zeros_like(latents)
    for i, timestep in enumerate(timesteps):
        rows = torch.full((len(latents),), int(timestep))
        taken = multistep(
            model(path[-1], rows),
            path[-1],
            origin,
            factors[i].expand(len(latents)),
            rows,
            torch.full_like(rows, int(prev_timesteps[i])),
            scheduler.alphas_cumprod,
            eta=eta,
            noise=None if noises is None else noises[i],
            prediction_type=scheduler.config.prediction_type,
            final_alpha_cumprod=1.0,
        )
        path.append(taken.prev_sample)
        origin = taken.origin
    return torch.stack(path)


def wiggly(sample: Tensor, timesteps: Tensor) -> Tensor:
    """A prediction that is no straight line in x or in t."""
    time = timesteps.view(-1, 1, 1, 1) / 1000
    return torch.tanh(sample * (1 + time)) + 0.3 * torch.cos(7 * time + sample.flip(-1))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_a_whole_trajectory_equals_diffusers(steps, prediction_type, spacing, eta, algorithm):
    scheduler = make_scheduler(spacing, prediction_type)
    oracle = DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type=algorithm, solver_order=2, solver_type="midpoint"
    )
    oracle.set_timesteps(steps)
    timesteps = timesteps_of(scheduler, steps)
    assert torch.equal(timesteps, oracle.timesteps)
    noises = torch.randn(steps, 2, *SHAPE, generator=torch.Generator().manual_seed(steps))
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = solve(wiggly, latents, timesteps, scheduler, eta, noises)
    for i, timestep in enumerate(oracle.timesteps):
        pred = wiggly(latents, torch.full((2,), int(timestep)))
        latents = oracle.step(pred, timestep, latents, variance_noise=noises[i]).prev_sample
        torch.testing.assert_close(path[i + 1], latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_a_zero_terminal_snr_equals_diffusers(eta, algorithm):
    scheduler = make_scheduler("trailing", "v_prediction", rescale_betas_zero_snr=True)
    oracle = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type=algorithm)
    oracle.set_timesteps(8)
    noises = torch.randn(8, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = solve(wiggly, latents, timesteps_of(scheduler, 8), scheduler, eta, noises)
    assert path.isfinite().all()
    for i, timestep in enumerate(oracle.timesteps):
        latents = oracle.step(wiggly(latents, timestep[None]), timestep, latents, variance_noise=noises[i]).prev_sample
    # diffusers starts at alpha 2^-24, we at exactly 0
    torch.testing.assert_close(path[-1], latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_first_order_is_ddim_and_the_noise_is_ddims_at_any_eta(eta):
    scheduler = make_scheduler("linspace")
    sample, pred, noise, earlier = torch.randn(4, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    args = (torch.tensor([901, 501, 1]), torch.tensor([801, 401, -1]), scheduler.alphas_cumprod)
    fixed = {"eta": eta, "noise": noise, "prediction_type": "epsilon", "final_alpha_cumprod": 1.0}
    ddim = ddim_step(pred, sample, *args, **fixed)
    first = multistep(pred, sample, earlier, torch.zeros(3), *args, **fixed)
    second = multistep(pred, sample, earlier, torch.tensor([0.5, 0.5, 0.0]), *args, **fixed)
    for field, other in zip(ddim, first, strict=True):
        assert torch.equal(field, other)
    assert torch.equal(second.std, ddim.std)
    assert torch.equal(second.origin, ddim.origin)
    assert (second.mean[:2] - ddim.mean[:2]).abs().min() > 0
    assert torch.equal(second.prev_sample[2], ddim.prev_sample[2])
    assert torch.equal(second.log_prob, log_prob_of(second.prev_sample, second.mean, second.std))


def test_rows_at_different_steps_of_different_schedules_equal_each_alone():
    scheduler = make_scheduler("leading")
    sample, pred, noise, earlier = torch.randn(4, 5, *SHAPE, generator=torch.Generator().manual_seed(5))
    timesteps, prev_timesteps = torch.tensor([951, 501, 91, 401, 1]), torch.tensor([901, 301, -1, 301, -1])
    factors, final = torch.tensor([0.0, 0.7, 0.0, 0.4, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.99])
    eta = torch.tensor([0.0, 1.0, 1.0, 0.3, 1.0])

    def step(rows: slice):
        return multistep(
            *(value[rows] for value in (pred, sample, earlier, factors, timesteps, prev_timesteps)),
            scheduler.alphas_cumprod,
            eta=eta[rows],
            noise=noise[rows],
            prediction_type="epsilon",
            final_alpha_cumprod=final[rows],
        )

    together = step(slice(None))
    for i in range(5):
        assert torch.equal(together.prev_sample[i : i + 1], step(slice(i, i + 1)).prev_sample)


class Gaussian:
    """Data N(mean, std^2): its score is known at every t, and so is the end of the probability-flow ODE."""

    def __init__(self, scheduler: DDIMScheduler, mean: float = 0.7, std: float = 0.4) -> None:
        self.mean, self.std = mean, std
        self.alphas = scheduler.alphas_cumprod

    def spread(self, alpha: Tensor) -> Tensor:
        return (alpha * self.std**2 + 1 - alpha).sqrt()

    def predict(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * (sample - alpha.sqrt() * self.mean) / self.spread(alpha) ** 2

    def carry(self, sample: Tensor, start: Tensor, end: Tensor) -> Tensor:
        first, last = self.alphas[start], self.alphas[end]
        scaled = (sample - first.sqrt() * self.mean) * self.spread(last) / self.spread(first)
        return last.sqrt() * self.mean + scaled


def test_on_a_gaussian_the_ode_is_of_second_order_and_beats_ddim():
    scheduler = make_scheduler("linspace")
    gaussian = Gaussian(scheduler)
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    errors: dict[bool, list[float]] = {True: [], False: []}
    # even steps in log(alpha / sigma) from 999 down to 200, which no count changes
    lambdas = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).log()
    counts = [16, 32, 64]
    for count in counts:
        targets = torch.linspace(float(lambdas[999]), float(lambdas[200]), count)
        timesteps = torch.stack([(lambdas - target).abs().argmin() for target in targets])
        # one more timestep, so that none of these is the last, first-order step
        timesteps = torch.cat([timesteps, torch.tensor([100])])
        exact = gaussian.carry(latents, timesteps[0], timesteps[-2])
        for second_order in errors:
            path = solve(gaussian.predict, latents, timesteps, scheduler, 0.0, second_order=second_order)
            errors[second_order].append(float((path[-3] - exact).abs().max()))
    for coarse, fine in zip(errors[True], errors[True][1:], strict=False):
        assert 1.9 < math.log2(coarse / fine) < 2.3
    for coarse, fine in zip(errors[False], errors[False][1:], strict=False):
        assert 0.9 < math.log2(coarse / fine) < 1.1
    assert all(fast < slow / 3 for fast, slow in zip(errors[True], errors[False], strict=True))


@pytest.mark.parametrize("eta", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [10, 20])
def test_on_a_gaussian_the_sde_keeps_the_distribution_better_than_ddim_at_any_eta(eta, steps):
    scheduler = make_scheduler("trailing")
    gaussian = Gaussian(scheduler)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 128, 128, generator=generator)
    noises = torch.randn(steps, 1, 4, 128, 128, generator=generator)
    timesteps = timesteps_of(scheduler, steps)
    # where the chain stands before its last step, which keeps only the mean of x_0
    spread = float(gaussian.spread(scheduler.alphas_cumprod[timesteps[-1]]))
    fast, slow = (
        solve(gaussian.predict, latents, timesteps, scheduler, eta, noises, second_order=order)[-2]
        for order in (True, False)
    )
    assert abs(float(fast.std()) - spread) < 0.5 * abs(float(slow.std()) - spread)
    assert float(fast.std()) == pytest.approx(spread, rel=0.02 if steps == 20 else 0.06)


@pytest.mark.parametrize("kind", ["systematic", "iid"])
def test_adapter_sampling_in_second_order_keeps_the_blends_mean(kind):
    """Where eps is linear in x: the x_0 of two steps come from two adapters, each with the weights as its marginals."""
    scheduler, weights, steps, seeds = make_scheduler("linspace"), (0.3, 0.7), 12, 600
    two = [Gaussian(scheduler, mean, std=1.0) for mean in (-2.0, 2.0)]
    timesteps = timesteps_of(scheduler, steps)
    latents = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)).expand(seeds, -1, -1, -1)
    schedules = torch.tensor([draw_ls_schedule(weights, steps, seed, kind) for seed in range(seeds)])
    acting = dict(zip(timesteps.tolist(), schedules.T, strict=True))

    def blended(sample: Tensor, rows: Tensor) -> Tensor:
        return sum(weight * one.predict(sample, rows) for weight, one in zip(weights, two, strict=True))

    def sampled(sample: Tensor, rows: Tensor) -> Tensor:
        preds = torch.stack([one.predict(sample, rows) for one in two])
        return preds[acting[int(rows[0])], torch.arange(seeds)]

    exact, ends = (solve(model, latents, timesteps, scheduler, 0.0)[-2] for model in (blended, sampled))
    error = float((ends - exact).mean())
    assert abs(error) < 4 * float((ends - exact).mean((1, 2, 3)).std()) / math.sqrt(seeds)
    assert float((ends - exact).std()) > 0.01


@pytest.mark.parametrize("spacing", SPACINGS)
def test_more_steps_than_the_spacing_has_timesteps_are_refused(spacing):
    fixed = {"num_train_timesteps": 1000, "spacing": spacing, "offset": 1}
    assert len(dpmpp_timesteps(250, **fixed)) == 250
    if spacing != "trailing":
        with pytest.raises(ValueError, match="fewer"):
            dpmpp_timesteps(1000, **fixed)


def test_the_factors_are_zero_where_there_is_no_history_or_no_noise_left():
    alphas = make_scheduler("leading").alphas_cumprod
    for steps in (1, 2):
        assert not extrapolation(torch.tensor([901, 401][:steps]), alphas).any()
    factors = extrapolation(torch.tensor([901, 601, 301, 1]), alphas)
    assert factors[0] == factors[-1] == 0
    assert (factors[1:-1] > 0).all()
