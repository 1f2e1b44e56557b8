"""One sample: what is asked for, the plan of its rows, its state while it runs, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from blend.mixing import draw_ls_schedule, guidance_coefficients
from blend.model import DiffusionModel, ModelError
from blend.preference import Preference


class SampleError(ValueError):
    """A sample that cannot be denoised; `param` names the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (str(self), self.param)


class DenoisingError(RuntimeError):
    """A sample whose latents stopped being finite."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to denoise."""

    prompt: str
    preference: Preference
    seed: int  # in [0, 2^63)
    negative_prompt: str = ""
    num_inference_steps: int = 20
    guidance_scale: float = 3.0  # finite, >= 0; 1 is no guidance
    eta: float = 1.0  # in [0, 1]: 0 deterministic, 1 ancestral; method "ls" needs more than 0
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    record: bool = False  # fill Output.trajectory
    measure_kl: bool | None = None  # fill Output.path_kl, at the price of base rows; None: as record


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The path a sample took; ordinary tensors that autograd may use."""

    latents: Tensor  # [T + 1, C, h, w] from x_T to x_0
    timesteps: Tensor  # [T]
    prev_timesteps: Tensor  # [T], -1 at the end
    log_probs: Tensor  # [T], averaged over latent elements


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


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of one sample at every step: S sources, each conditional and unconditional as guidance needs."""

    conditional: tuple[bool, ...]  # [R] whether a row sees the prompt or the negative prompt
    coefficients: Tensor  # [R] weight of each row in the sample's prediction
    base_coefficients: Tensor  # [R] weight of each row in the base's prediction; zeros unless measured
    mixes: Tensor  # [R, K], or [K + 1, R, K] indexed by the source that acts when there is a schedule
    schedule: tuple[int, ...]  # [T] the source that acts at each step (method "ls"); empty otherwise
    measured: bool

    def mix_at(self, step: int) -> Tensor:
        """Return the adapter mix [R, K] of a step."""
        return self.mixes[self.schedule[step]] if self.schedule else self.mixes


def plan_rows(sample: Sample, basis: Sequence[str], steps: int) -> RowPlan:
    """Lay out the rows of a sample; a coefficient of 0 costs no row, except the base rows of a measured KL."""
    coefficients = sample.preference.coefficients(basis)
    one_hot = torch.cat([torch.zeros(1, len(basis)), torch.eye(len(basis))])  # [K + 1, K]; row 0 is the base
    active = [source for source, value in enumerate(coefficients) if value != 0]
    measured = bool(sample.record if sample.measure_kl is None else sample.measure_kl)
    schedule: tuple[int, ...] = ()
    # each source is (coefficient, share of the base prediction, mix row)
    if sample.preference.method == "ls" and len(active) > 1:
        schedule = tuple(draw_ls_schedule(coefficients, steps, sample.seed))
        sources = [(1.0, 0.0, one_hot[0])]
    elif sample.preference.method == "soup" and active != [0]:
        sources = [(1.0, 0.0, torch.tensor(coefficients[1:]))]
    else:
        sources = [(coefficients[source], float(source == 0), one_hot[source]) for source in active]
    if measured and not any(base for _, base, _ in sources):
        sources.append((0.0, 1.0, one_hot[0]))

    guidance = zip((False, True), guidance_coefficients(sample.guidance_scale), strict=True)
    sides = [(conditional, share) for conditional, share in guidance if share != 0]
    rows = [(source, conditional, share) for source in sources for conditional, share in sides]
    mixes = torch.stack([mix for (_, _, mix), _, _ in rows])
    if schedule:
        acting = torch.tensor([coefficient != 0 for (coefficient, _, _), _, _ in rows])
        mixes = one_hot[:, None, :] * acting[None, :, None]
    return RowPlan(
        conditional=tuple(conditional for _, conditional, _ in rows),
        coefficients=torch.tensor([coefficient * share for (coefficient, _, _), _, share in rows]),
        base_coefficients=torch.tensor([base * share * measured for (_, base, _), _, share in rows]),
        mixes=mixes,
        schedule=schedule,
        measured=measured,
    )


@dataclass(slots=True)
class Running:
    """A sample on its way."""

    ticket: int
    sample: Sample
    plan: RowPlan
    embeds: Tensor  # [R, L, D]
    timesteps: Tensor  # [T] on the CPU
    prev_timesteps: Tensor
    generator: torch.Generator
    latents: Tensor  # [C, h, w]
    step: int = 0
    error: Exception | None = None
    path_kl: float = 0.0
    history: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.timesteps)

    @property
    def rows(self) -> int:
        return len(self.plan.conditional)

    @property
    def ended(self) -> bool:
        return self.error is not None or self.step == self.total

    def draw_noise(self) -> Tensor:
        """Draw this step's noise [C, h, w]; zeros, and nothing drawn, when eta is 0."""
        if self.sample.eta == 0:
            return torch.zeros(self.latents.shape)
        return torch.randn(self.latents.shape, generator=self.generator)

    def advance(self, prev_sample: Tensor, log_prob: Tensor, kl: float, finite: bool) -> None:
        """Take over the step's result, or end with an error when it is not finite."""
        self.step += 1
        self.latents = prev_sample
        self.path_kl += kl
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
        spent = self.rows * self.step
        if self.error is not None:
            return Output(self.sample, None, spent, self.step, error=self.error)
        trajectory = None
        with torch.inference_mode(False):
            if self.sample.record:
                trajectory = Trajectory(
                    latents=torch.stack(self.history).clone(),
                    timesteps=self.timesteps.clone(),
                    prev_timesteps=self.prev_timesteps.clone(),
                    log_probs=torch.stack(self.log_probs).clone(),
                )
            path_kl = self.path_kl if self.plan.measured and self.sample.eta > 0 else None
            return Output(self.sample, self.latents.clone(), spent, self.step, trajectory, path_kl)


def start(ticket: int, sample: Sample, model: DiffusionModel, basis: Sequence[str]) -> Running:
    """Check a sample against the model and basis and set it on its way."""
    _check(sample)
    height = model.default_height if sample.height is None else sample.height
    width = model.default_width if sample.width is None else sample.width
    try:
        timesteps, prev_timesteps = model.timesteps(sample.num_inference_steps)
        shape = model.latents_shape(height, width)
    except ModelError as error:
        # the model's message starts with the field it is about
        raise SampleError(str(error), str(error).split()[0]) from error
    plan = plan_rows(sample, basis, len(timesteps))
    embeds = model.encode_prompts([sample.negative_prompt, sample.prompt])
    generator = torch.Generator().manual_seed(sample.seed)
    latents = torch.randn(shape, generator=generator).to(model.device)
    running = Running(
        ticket=ticket,
        sample=sample,
        plan=plan,
        embeds=embeds[torch.tensor(plan.conditional, device=embeds.device).long()],
        timesteps=timesteps,
        prev_timesteps=prev_timesteps,
        generator=generator,
        latents=latents,
    )
    if sample.record:
        running.history.append(latents)
    return running


def _check(sample: Sample) -> None:
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(sample, name), str):
            raise SampleError(f"{name} is {getattr(sample, name)!r}: use a string", name)
    if isinstance(sample.seed, bool) or not isinstance(sample.seed, int) or not 0 <= sample.seed < 2**63:
        raise SampleError(f"seed is {sample.seed!r}: use an integer from 0 to 2^63 - 1", "seed")
    for name in ("guidance_scale", "eta"):
        value = getattr(sample, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise SampleError(f"{name} is {value!r}: use a number", name)
    if not (math.isfinite(sample.guidance_scale) and sample.guidance_scale >= 0):
        raise SampleError(
            f"guidance_scale is {sample.guidance_scale}: use a finite number >= 0 (1 is no guidance)", "guidance_scale"
        )
    if not 0 <= sample.eta <= 1:
        raise SampleError(f"eta is {sample.eta}: use a number from 0 to 1", "eta")
    if sample.preference.method == "ls" and sample.eta == 0:
        raise SampleError("eta is 0: method ls needs noise between adapters; use eta > 0 or method mpa", "eta")
