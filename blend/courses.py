"""The way a sample takes through the noise levels: its solver's timesteps, and what each step needs beside x_t.

DDIM takes the timesteps of the model's own spacing. DPM-Solver++ does too, except that "leading" becomes "linspace",
the default of diffusers' scheduler for it: "leading" starts below the top of the schedule (at 801 of 999 with 5 steps),
and taking pure noise for x_801 errs by more than a faster solver can win back. On 16 sprites at 10 steps, median
distance to the converged ODE (tests/bench/solvers.py): DDIM 0.33, DDIM at the timesteps of linspace 0.23, DPM-Solver++
0.40 with leading and 0.08 with linspace.

Samples on different solvers share every forward of the UNet; here their steps share one call too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blend.ddim import DDIMStep, ddim_step
from blend.model import DiffusionModel, ModelError
from blend.solvers import dpmpp_timesteps, extrapolation, multistep


@dataclass(frozen=True, slots=True)
class Course:
    """The steps of one sample; tensors on the CPU."""

    timesteps: Tensor  # [T] long
    prev_timesteps: Tensor  # [T] long, -1 at the end
    factors: Tensor  # [T] how far a step extrapolates from the previous x_0; zeros for DDIM
    final_alpha_cumprod: float  # where the last step ends


def plot_course(model: DiffusionModel, num_inference_steps: int, solver: str) -> Course:
    """Return a course under the model's own noise schedule; see the module for its timesteps.

    Raises ModelError, whose message starts with num_inference_steps, when there is no such number of steps.
    """
    timesteps, prev_timesteps = model.timesteps(num_inference_steps)
    if solver == "ddim":
        final = float(model.scheduler.final_alpha_cumprod)
        return Course(timesteps, prev_timesteps, torch.zeros(len(timesteps)), final)
    config = model.scheduler.config
    spacing = "linspace" if config.timestep_spacing == "leading" else config.timestep_spacing
    try:
        timesteps = dpmpp_timesteps(
            num_inference_steps,
            num_train_timesteps=config.num_train_timesteps,
            spacing=spacing,
            offset=config.steps_offset,
        )
    except ValueError as error:
        raise ModelError(f"num_inference_steps is {num_inference_steps}: {error}; use fewer, or solver ddim") from error
    prev_timesteps = torch.cat([timesteps[1:], torch.tensor([-1])])
    return Course(timesteps, prev_timesteps, extrapolation(timesteps, model.scheduler.alphas_cumprod), 1.0)


class Standing(NamedTuple):
    """Where n samples stand, each on its own course."""

    timesteps: Tensor  # [n]
    prev_timesteps: Tensor  # [n]
    final_alpha_cumprod: Tensor  # [n]
    factors: Tensor  # [n]
    previous_origin: Tensor | None  # [n, C, h, w] the x_0 of the step before; None when nobody extrapolates


def stand(places: Sequence[tuple[Course, int, Tensor | None]], latents: Tensor) -> Standing:
    """Return where the samples stand. places: (course, step, predicted x_0 of the step before); latents: [n, ...]."""
    device = latents.device
    factors = torch.stack([course.factors[step] for course, step, _ in places])
    origins = None
    if factors.any():
        origins = torch.stack([torch.zeros_like(latents[0]) if origin is None else origin for _, _, origin in places])
    return Standing(
        torch.stack([course.timesteps[step] for course, step, _ in places]).to(device),
        torch.stack([course.prev_timesteps[step] for course, step, _ in places]).to(device),
        torch.tensor([course.final_alpha_cumprod for course, _, _ in places], device=device),
        factors.to(device),
        origins,
    )


def take_step(
    model: DiffusionModel, noise_pred: Tensor, latents: Tensor, at: Standing, *, eta: Tensor, noise: Tensor | None
) -> DDIMStep:
    """Take every sample one step along its course. noise_pred, latents, noise: [n, C, h, w]; eta: [n]."""
    schedule = model.scheduler.alphas_cumprod
    options: dict[str, Any] = {
        "eta": eta,
        "noise": noise,
        "prediction_type": model.prediction_type,
        "final_alpha_cumprod": at.final_alpha_cumprod,
        "clip_sample_range": model.clip_sample_range,
    }
    if at.previous_origin is None:
        return ddim_step(noise_pred, latents, at.timesteps, at.prev_timesteps, schedule, **options)
    return multistep(
        noise_pred, latents, at.previous_origin, at.factors, at.timesteps, at.prev_timesteps, schedule, **options
    )
