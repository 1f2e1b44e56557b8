"""The base model's way through the noise, for methods that look at or change what lies between two steps.

Several samples go side by side, each in one or more copies. Rows, guidance, steps and noise are the engine's own: a
walk that changes nothing ends where the engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blend.baselines.found import candidate_seeds
from blend.conditioning import Conditioning
from blend.ddim import DDIMStep
from blend.engine import BlendEngine, Sample, SampleError
from blend.mixing import blend_predictions
from blend.running import start


class Walk:
    """S samples on their way; n latents [n, C, h, w] are those of the first sample, then of the next, n / S of each."""

    def __init__(self, engine: BlendEngine, samples: Sequence[Sample], *, copies: int = 1, tile_rows: int = 24) -> None:
        """copies: streams of noise per sample, the first its own; tile_rows bounds the rows of one forward.

        Raises SampleError unless all samples are of the base model, on DDIM, unrecorded and alike but for prompts and
        seeds.
        """
        for sample in samples:
            _check(sample, samples[0])
        self._model, self._bank, self.tile_rows = engine.model, engine.bank, tile_rows
        self._runs = [
            start(0, replace(sample, seed=seed), engine.model, engine.bank.names)
            for sample in samples
            for seed in candidate_seeds(sample.seed, copies)
        ]
        self._firsts = self._runs[::copies]
        self._conditioning = Conditioning.cat([run.conditioning for run in self._firsts])  # [2 S]
        self._eta = samples[0].eta

    @property
    def total(self) -> int:
        """The number of steps."""
        return self._firsts[0].total

    def begin(self) -> Tensor:
        """Return x_T [S, C, h, w]: the engine's, for each sample's seed."""
        return torch.stack([run.latents for run in self._firsts])

    def prompts(self, n: int) -> list[str]:
        """Return the prompts of n latents."""
        return [run.sample.prompt for run in self._firsts for _ in range(n // len(self._firsts))]

    def rows(self, step: int) -> int:
        """Return the UNet rows of predicting for one latent: 2 where guidance acts."""
        return len(self._firsts[0].plan.steps[step].conditional)

    def predict(self, latents: Tensor, step: int, samples: Tensor | None = None) -> Tensor:
        """Return the base's guided prediction [n, C, h, w]; gradients reach the latents.

        samples [n] long: whose latents these are, where not n / S of each.
        """
        rows, n = self._firsts[0].plan.steps[step], len(latents)
        if samples is None:
            samples = torch.arange(len(self._firsts)).repeat_interleave(n // len(self._firsts))
        owner = torch.arange(n).repeat_interleave(len(rows.conditional))
        text = 2 * samples[owner] + torch.tensor(rows.conditional).long().repeat(n)
        mix = rows.mixes.repeat(n, 1)
        preds = [self._forward(latents, step, *tile) for tile in _tiles(self.tile_rows, owner, text, mix)]
        return blend_predictions(torch.cat(preds), rows.coefficients.repeat(n), owner, n)

    def origin(self, noise_pred: Tensor, latents: Tensor, step: int) -> Tensor:
        """Return the x_0 [n, C, h, w] that a prediction means, clamped where the model's schedule asks for it."""
        return self._ddim(noise_pred, latents, step, 0.0, None).origin

    def advance(self, noise_pred: Tensor, latents: Tensor, step: int) -> Tensor:
        """Take one DDIM step, each latent with the noise of its own stream; n is S times the copies."""
        noise = torch.stack([run.draw_noise() for run in self._runs]).to(latents.device)
        return self._ddim(noise_pred, latents, step, self._eta, noise).prev_sample

    def alpha_cumprod(self, step: int) -> float:
        """Return alpha-bar of the step's timestep: x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) eps."""
        return float(self._model.scheduler.alphas_cumprod[self._firsts[0].course.timesteps[step]])

    def noise_to_prediction(self, step: int) -> float:
        """Return what a change of eps by 1, at fixed x_t, changes the model's prediction by."""
        # v = sqrt(abar) eps - sqrt(1 - abar) x_0 with x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar)
        return 1.0 if self._model.prediction_type == "epsilon" else self.alpha_cumprod(step) ** -0.5

    def _ddim(self, noise_pred: Tensor, latents: Tensor, step: int, eta: float, noise: Tensor | None) -> DDIMStep:
        course = self._firsts[0].course
        at = course.timesteps[step].expand(len(latents)).to(latents.device)
        to = course.prev_timesteps[step].expand(len(latents)).to(latents.device)
        return self._model.ddim_step(noise_pred, latents, at, to, eta=eta, noise=noise)

    def _forward(self, latents: Tensor, step: int, owner: Tensor, text: Tensor, mix: Tensor) -> Tensor:
        conditioning = self._conditioning.rows(text)
        timestep = self._firsts[0].course.timesteps[step]
        # first layers are shared by a latent's rows where they see no text, and where nobody differentiates
        kin = None if latents.requires_grad or conditioning.added else owner
        return self._bank.forward(
            latents[owner.to(latents.device)].to(self._model.dtype),
            timestep.expand(len(owner)).to(latents.device),
            conditioning.embeds,
            mix,
            added_cond_kwargs=conditioning.added,
            kin=kin,
        )


def _tiles(rows: int, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(column.split(rows) for column in columns), strict=True))


def _check(sample: Sample, first: Sample) -> None:
    if sample.preference.kl_lambda != 0:
        raise SampleError("preference: this rival steers the base model alone; use Preference.base()", "preference")
    if sample.solver != "ddim":
        raise SampleError(f"solver is {sample.solver!r}: this rival's steps are DDIM's; use ddim", "solver")
    if sample.record or sample.measure_kl:
        raise SampleError("record and measure_kl are the engine's: this rival keeps no trajectory", "record")
    ours, theirs = (replace(one, prompt="", negative_prompt="", seed=0) for one in (sample, first))
    if ours != theirs:
        raise SampleError(f"{ours} and {theirs} go different ways: give samples that differ in prompts and seed", "")
