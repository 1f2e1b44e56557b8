"""A sample on its way: its plan, its state, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from blend.conditioning import Conditioning
from blend.courses import Course, plot_course
from blend.model import DiffusionModel, ModelError
from blend.plans import Plan, StepRows, plan_rows
from blend.sample import Sample, SampleError, check_sample


class DenoisingError(RuntimeError):
    """A sample whose latents stopped being finite."""


class Reference(NamedTuple):
    """The base's transition at one state of a path."""

    mean: Tensor  # [C, h, w] of x_{t-1} given x_t
    kl: float  # of the sample's transition to it, in nats averaged over latent elements


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The path a sample took; ordinary tensors that autograd may use."""

    latents: Tensor  # [T + 1, C, h, w] from x_T to x_0
    timesteps: Tensor  # [T]
    prev_timesteps: Tensor  # [T], -1 at the end
    log_probs: Tensor  # [T], averaged over latent elements
    references: Mapping[int, Reference]  # by step: those of Sample.reference_steps


@dataclass(slots=True)
class Output:
    """What came of a sample: latents, or the error that ended it."""

    sample: Sample
    latents: Tensor | None  # [C, h, w] float32
    rows: int  # UNet rows spent
    steps: int  # steps taken
    trajectory: Trajectory | None = None
    path_kl: float | None = None  # nats per latent element against the base, summed over steps; None if not measured
    error: Exception | None = None


@dataclass(slots=True)
class Running:
    """A sample on its way."""

    ticket: int
    sample: Sample
    plan: Plan
    prompts: tuple[str | None, str]  # the negative prompt, None for none, and the prompt
    conditioning: Conditioning  # of these two
    course: Course  # on the CPU
    generator: torch.Generator
    latents: Tensor  # [C, h, w]
    step: int = 0
    error: Exception | None = None
    path_kl: float = 0.0
    origin: Tensor | None = None  # [C, h, w] the x_0 predicted by the latest step; None before the first
    kept: Tensor | None = None  # [C, h, w] the residual that an earlier step kept for later ones
    history: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    references: dict[int, Reference] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.course.timesteps)

    @property
    def rows(self) -> StepRows:
        """The rows of the step to come."""
        return self.plan.steps[self.step]

    @property
    def ended(self) -> bool:
        return self.error is not None or self.step == self.total

    def draw_noise(self) -> Tensor:
        """Draw this step's noise [C, h, w]; zeros, and nothing drawn, when eta is 0."""
        if self.sample.eta == 0:
            return torch.zeros(self.latents.shape)
        return torch.randn(self.latents.shape, generator=self.generator)

    def advance(
        self, prev_sample: Tensor, origin: Tensor, log_prob: Tensor, base: Reference | None, finite: bool
    ) -> None:
        """Take over the step's result, or end with an error when it is not finite. base: None if no row measured it."""
        if base is not None:
            self.path_kl += base.kl
            if self.step in self.sample.reference_steps:
                self.references[self.step] = base
        self.step += 1
        self.latents = prev_sample
        self.origin = origin
        if self.sample.record:
            self.history.append(prev_sample)
            self.log_probs.append(log_prob)
        if not finite:
            self.fail(
                DenoisingError(
                    f"the sample with seed {self.sample.seed} is not finite after step {self.step} of {self.total}:"
                    f" lower guidance_scale ({self.sample.guidance_scale:g}) or"
                    f" kl_lambda ({self.sample.preference.kl_lambda:g})"
                )
            )

    def fail(self, error: Exception) -> None:
        """End here."""
        self.error = error

    def output(self) -> Output:
        """Return what came of it, in ordinary tensors though the engine runs in inference mode."""
        spent = self.plan.rows_until(self.step)
        if self.error is not None:
            return Output(self.sample, None, spent, self.step, error=self.error)
        trajectory = None
        with torch.inference_mode(False):
            if self.sample.record:
                trajectory = Trajectory(
                    latents=torch.stack(self.history).clone(),
                    timesteps=self.course.timesteps.clone(),
                    prev_timesteps=self.course.prev_timesteps.clone(),
                    log_probs=torch.stack(self.log_probs).clone(),
                    references={at: Reference(base.mean.clone(), base.kl) for at, base in self.references.items()},
                )
            path_kl = self.path_kl if self.plan.measured and self.sample.eta > 0 else None
            return Output(self.sample, self.latents.clone(), spent, self.step, trajectory, path_kl)


def start(ticket: int, sample: Sample, model: DiffusionModel, basis: Sequence[str]) -> Running:
    """Check a sample against the model and basis and set it on its way."""
    check_sample(sample)
    height = model.default_height if sample.height is None else sample.height
    width = model.default_width if sample.width is None else sample.width
    try:
        course = plot_course(model, sample.num_inference_steps, sample.solver)
        shape = model.latents_shape(height, width)
    except ModelError as error:
        # the model's message starts with the field it is about
        raise SampleError(str(error), str(error).split()[0]) from error
    measured = bool(sample.record if sample.measure_kl is None else sample.measure_kl)
    plan = plan_rows(sample, basis, len(course.timesteps), measured=measured)
    prompts = (sample.negative_prompt or None, sample.prompt)
    generator = torch.Generator().manual_seed(sample.seed)
    latents = torch.randn(shape, generator=generator).to(model.device)
    running = Running(
        ticket=ticket,
        sample=sample,
        plan=plan,
        prompts=prompts,
        conditioning=model.encode_prompts(prompts, height, width),
        course=course,
        generator=generator,
        latents=latents,
    )
    if sample.record:
        running.history.append(latents)
    return running
