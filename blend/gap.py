"""The Jensen gap: how far a blend's predictions lie from those of a model retrained for the same preference, by step.

The blend takes E[r / alpha | x_t] for log E[exp(r / alpha) | x_t] (arXiv 2505.18547): exact as t -> 0, the worse the
smaller alpha. A model retrained for the preference, the oracle, is tuned on the latter. Both, and the base, predict at
every state x_t of a path that one of the two takes. Rows, guidance, noise and steps are the engine's own: the path
ends where the engine does.

How well the oracle was trained is part of what is measured: two trainings for one reward have a gap too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from blend.conditioning import Conditioning
from blend.ddim import MIN_STD, DDIMStep, kl_of
from blend.engine import BlendEngine
from blend.mixing import blend_predictions
from blend.plans import StepRows, plan_rows
from blend.preference import Preference
from blend.running import DenoisingError, start
from blend.sample import Sample, SampleError

Side = Literal["blend", "oracle"]


@dataclass(frozen=True, slots=True)
class Gap:
    """What S paths of T steps show; float64 on the CPU. Distances are root mean squares over latent elements, in eps.

    At fixed x_t a change of eps by d is one of v by d / sqrt(alpha-bar_t): so are v models brought to units of eps.
    """

    timesteps: Tensor  # [T] long
    alphas_cumprod: Tensor  # [T] alpha-bar of the timesteps
    distance: Tensor  # [S, T] |eps_blend - eps_oracle|
    oracle_shift: Tensor  # [S, T] |eps_oracle - eps_base|
    blend_shift: Tensor  # [S, T] |eps_blend - eps_base|
    inner: Tensor  # [S, T] mean of (eps_blend - eps_base) (eps_oracle - eps_base) over elements
    relative: Tensor  # [S, T] distance / oracle_shift; NaN where the oracle predicts what the base does
    cosine: Tensor  # [S, T] of the two shifts; NaN where one of them is 0
    kl: Tensor  # [S, T] |mu_blend - mu_oracle|^2 / (2 sigma_t^2) in nats, all elements; NaN where a step has no noise
    base_kl: Tensor  # [S, T] the same of the side that walks, against the base
    latents: Tensor  # [S, C, h, w] float32, where the paths end

    @property
    def path_kl(self) -> Tensor:
        """Return [S] the sum of kl, whose mean is KL(paths of who walks || paths of the other); NaN without noise."""
        return _over_noisy_steps(self.kl)

    @property
    def base_path_kl(self) -> Tensor:
        """Return [S] the sum of base_kl, whose mean is KL(paths of who walks || the base's); NaN without noise."""
        return _over_noisy_steps(self.base_kl)


@torch.no_grad()
def measure_gap(
    engine: BlendEngine,
    samples: Sequence[Sample],
    oracle: Preference,
    *,
    along: Side = "blend",
    tile_rows: int = 24,
) -> Gap:
    """Walk each sample, whose preference is the blend's, and compare with `oracle`, usually one-hot on its adapter.

    along: whose predictions take the steps; tile_rows bounds the rows of one forward. record and measure_kl make no
    difference. Raises SampleError unless samples are on DDIM and alike but for prompts, seeds and weights, and for
    methods whose predictions need earlier steps; PreferenceError; DenoisingError for latents that are not finite.
    """
    if along not in get_args(Side):
        raise ValueError(f"along is {along!r}: use one of {', '.join(get_args(Side))}")
    if not samples:
        raise ValueError("there are no samples: give at least one")
    walk = _Walk(engine, samples, oracle, along, tile_rows)
    latents, columns = walk.begin(), []
    for step in range(walk.total):
        preds = walk.predict(latents, step)
        taken = [walk.advance(pred, latents, step) for pred in preds]
        columns.append(_compare(preds, taken, walk.side, walk.prediction_to_noise(step)))
        latents = walk.draw(taken[walk.side])
    for sample, ended in zip(samples, latents, strict=True):
        if not ended.isfinite().all():
            raise DenoisingError(f"the sample with seed {sample.seed} is not finite: lower its guidance or kl_lambda")
    values = {name: torch.stack([getattr(one, name) for one in columns], dim=1).cpu() for name in _Column._fields}
    return Gap(walk.timesteps, walk.alphas_cumprod, latents=latents, **values)


def _over_noisy_steps(kl: Tensor) -> Tensor:
    summed = kl.nansum(1)
    return torch.where(kl.isnan().all(1), torch.full_like(summed, torch.nan), summed)


class _Column(NamedTuple):
    """One step of a Gap, each [S]."""

    distance: Tensor
    oracle_shift: Tensor
    blend_shift: Tensor
    inner: Tensor
    relative: Tensor
    cosine: Tensor
    kl: Tensor
    base_kl: Tensor


def _compare(preds: Sequence[Tensor], taken: Sequence[DDIMStep], side: int, to_noise: float) -> _Column:
    """Compare predictions and steps of blend, oracle and base, each [S, C, h, w]; side: the place of who walks."""
    blend, oracle, base = (pred.double().flatten(1) for pred in preds)
    ours, theirs = blend - base, oracle - base
    distance, shift, other = ((d**2).mean(1).sqrt() for d in (blend - oracle, theirs, ours))
    inner = (ours * theirs).mean(1)
    std = taken[0].std
    elements = torch.where(std >= MIN_STD, float(blend.shape[1]), torch.nan).double()
    return _Column(
        distance=distance * to_noise,
        oracle_shift=shift * to_noise,
        blend_shift=other * to_noise,
        inner=inner * to_noise**2,
        # before they become eps, of which nothing is left at alpha-bar 0
        relative=distance / shift,
        cosine=inner / (shift * other),
        kl=kl_of(taken[0].mean, taken[1].mean, std) * elements,
        base_kl=kl_of(taken[side].mean, taken[2].mean, std) * elements,
    )


class _Walk:
    """S samples on the way of one side."""

    def __init__(
        self, engine: BlendEngine, samples: Sequence[Sample], oracle: Preference, along: Side, tile_rows: int
    ) -> None:
        self.side = get_args(Side).index(along)
        self._model, self._bank, self._tile_rows = engine.model, engine.bank, tile_rows
        self._eta = samples[0].eta
        plain = [_plain(sample, samples[0]) for sample in samples]
        sides = [
            [replace(sample, preference=wanted) for wanted in (sample.preference, oracle, Preference.base())]
            for sample in plain
        ]
        self._runs = [start(0, three[self.side], self._model, self._bank.names) for three in sides]
        self._course = self._runs[0].course
        self._conditioning = Conditioning.cat([run.conditioning for run in self._runs])  # [2 S]
        self._plans = [[self._planned(sample) for sample in three] for three in sides]

    @property
    def total(self) -> int:
        return len(self._course.timesteps)

    @property
    def timesteps(self) -> Tensor:
        return self._course.timesteps.clone()

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._model.scheduler.alphas_cumprod.cpu().double()[self._course.timesteps]

    def prediction_to_noise(self, step: int) -> float:
        """Return what a change of the model's prediction by 1, at fixed x_t, changes eps by."""
        # eps = sqrt(abar) v + sqrt(1 - abar) x_t
        return 1.0 if self._model.prediction_type == "epsilon" else float(self.alphas_cumprod[step]) ** 0.5

    def begin(self) -> Tensor:
        """Return x_T [S, C, h, w]."""
        return torch.stack([run.latents for run in self._runs])

    def predict(self, latents: Tensor, step: int) -> list[Tensor]:
        """Return the guided predictions [S, C, h, w] of blend, oracle and base at x_t [S, C, h, w]."""
        rows = [_Rows.of([plan[step] for plan in three]) for three in self._plans]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(one.conditional) for one in rows]))
        text = 2 * owner + torch.cat([one.conditional for one in rows])
        mix = torch.cat([one.mixes for one in rows])
        tiles = zip(*(column.split(self._tile_rows) for column in (owner, text, mix)), strict=True)
        preds = torch.cat([self._forward(latents, step, *tile) for tile in tiles])
        coefficients = torch.cat([one.coefficients for one in rows], dim=1)
        return [blend_predictions(preds, side, owner, len(rows)) for side in coefficients]

    def advance(self, noise_pred: Tensor, latents: Tensor, step: int) -> DDIMStep:
        """Return the step that a prediction means, without its noise."""
        at, to = (
            times[step].expand(len(latents)).to(latents.device)
            for times in (self._course.timesteps, self._course.prev_timesteps)
        )
        return self._model.ddim_step(noise_pred, latents, at, to, eta=self._eta, noise=None)

    def draw(self, taken: DDIMStep) -> Tensor:
        """Return x_{t-1} [S, C, h, w], each with the noise of its own seed."""
        noise = torch.stack([run.draw_noise() for run in self._runs]).to(taken.mean.device)
        return taken.mean + taken.std.view(-1, 1, 1, 1) * noise

    def _planned(self, sample: Sample) -> tuple[StepRows, ...]:
        steps = plan_rows(sample, self._bank.names, self.total, measured=False).steps
        if any(rows.reuse for rows in steps):
            method = sample.preference.method
            raise SampleError(f"method {method} reuses predictions of earlier states: use mpa, soup or ls", "method")
        return steps

    def _forward(self, latents: Tensor, step: int, owner: Tensor, text: Tensor, mix: Tensor) -> Tensor:
        conditioning = self._conditioning.rows(text)
        return self._bank.forward(
            latents[owner.to(latents.device)].to(self._model.dtype),
            self._course.timesteps[step].expand(len(owner)).to(latents.device),
            conditioning.embeds,
            mix,
            added_cond_kwargs=conditioning.added,
            kin=text if conditioning.added else owner,
        )


class _Rows(NamedTuple):
    """The rows of several plans of one sample at one step; what two of them run, runs once."""

    conditional: Tensor  # [R] long
    mixes: Tensor  # [R, K]
    coefficients: Tensor  # [plans, R]

    @classmethod
    def of(cls, planned: Sequence[StepRows]) -> _Rows:
        rows: dict[tuple[tuple[float, ...], bool], list[float]] = {}
        for place, steps in enumerate(planned):
            each = zip(steps.mixes.tolist(), steps.conditional, steps.coefficients.tolist(), strict=True)
            for mix, conditional, share in each:
                rows.setdefault((tuple(mix), conditional), [0.0] * len(planned))[place] += share
        return cls(
            torch.tensor([conditional for _, conditional in rows]).long(),
            torch.tensor([mix for mix, _ in rows]),
            torch.tensor(list(rows.values())).T,
        )


def _plain(sample: Sample, first: Sample) -> Sample:
    """Return the sample without what it asks the engine to take down."""
    if sample.solver != "ddim":
        raise SampleError(f"solver is {sample.solver!r}: the gap is measured on DDIM's steps; use ddim", "solver")
    one, other = (
        replace(s, prompt="", negative_prompt="", seed=0, preference=first.preference) for s in (sample, first)
    )
    if one != other:
        raise SampleError(
            f"{sample} and {first} go different ways: give samples that differ in prompts, seeds and weights", ""
        )
    return replace(sample, record=False, measure_kl=None, reference_steps=())
