"""The trained policy: a denoising transition under the adapter and under the base, on the same UNet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from blend.adapters import AdapterBank
from blend.conditioning import Conditioning
from blend.ddim import MIN_STD
from blend.finetune.config import TrainConfig
from blend.finetune.rollout import Scored
from blend.model import DiffusionModel

# steps with less noise are all but deterministic: their likelihoods would carry most of the gradient's variance and
# hardly any of its signal, so that they count in the KL alone
REWARDED_STD = 0.05


@dataclass(frozen=True, slots=True)
class Transitions:
    """M recorded denoising steps x_t -> x_prev, stored without graphs."""

    latents: Tensor  # [M, C, h, w] x_t
    prev_latents: Tensor  # [M, C, h, w] what was drawn
    timesteps: Tensor  # [M]
    prev_timesteps: Tensor  # [M]
    log_probs: Tensor  # [M] of the draw under the policy that made it, mean over elements
    base_means: Tensor  # [M, C, h, w] mean of x_prev under the base
    kl: Tensor  # [M] of the policy that made the draw against the base, in nats, mean over elements
    sample: Tensor  # [M] index of the sample in the global batch
    step: Tensor  # [M] number of the denoising step
    slot: Tensor  # [M] place among the trained steps of its sample: decides which update takes it
    weight: Tensor  # [M] number of the path's steps that this one stands for
    text: Tensor  # [M] row of the prompts' conditioning

    def __len__(self) -> int:
        return len(self.timesteps)

    def select(self, index: Tensor | slice) -> "Transitions":
        """The transitions at `index`."""
        return Transitions(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def of(cls, scored: Scored, steps: Sequence[Mapping[int, float]]) -> "Transitions":
        """The trained `steps` {step: weight} of N recorded paths, at each of which the base was evaluated too.

        `text` counts the samples' places in `scored`.
        """
        rows = [
            (place, request.index, step, slot, weight)
            for place, (request, chosen) in enumerate(zip(scored.requests, steps, strict=True))
            for slot, (step, weight) in enumerate(chosen.items())
        ]
        paths = scored.trajectories
        device = paths[0].latents.device
        return cls(
            latents=torch.stack([paths[place].latents[step] for place, _, step, _, _ in rows]),
            prev_latents=torch.stack([paths[place].latents[step + 1] for place, _, step, _, _ in rows]),
            timesteps=torch.stack([paths[place].timesteps[step] for place, _, step, _, _ in rows]).to(device),
            prev_timesteps=torch.stack([paths[place].prev_timesteps[step] for place, _, step, _, _ in rows]).to(device),
            log_probs=torch.stack([paths[place].log_probs[step] for place, _, step, _, _ in rows]),
            base_means=torch.stack([paths[place].references[step].mean for place, _, step, _, _ in rows]),
            kl=torch.tensor([paths[place].references[step].kl for place, _, step, _, _ in rows], device=device),
            sample=torch.tensor([row[1] for row in rows], device=device),
            step=torch.tensor([row[2] for row in rows], device=device),
            slot=torch.tensor([row[3] for row in rows], device=device),
            weight=torch.tensor([row[4] for row in rows], device=device),
            text=torch.tensor([row[0] for row in rows], device=device),
        )


class Policy:
    """Transition mean and std under the adapter at given states, with gradient.

    Guided exactly as the rollouts were: eps = eps_unc + g (eps_txt - eps_unc), both rows with the adapter.
    """

    def __init__(self, config: TrainConfig, model: DiffusionModel, bank: AdapterBank) -> None:
        self.config = config
        self.model = model
        self.bank = bank

    @property
    def rows_per_transition(self) -> int:
        """UNet rows of one transition: conditional, and unconditional when guided."""
        return 1 if self.config.guidance_scale == 1 else 2

    def transition(self, part: Transitions, text: Conditioning) -> tuple[Tensor, Tensor]:
        """(mean [M, C, h, w], std [M]) at states `part` with the prompts of M rows."""
        count = len(part)
        latents, timesteps = part.latents, part.timesteps
        if self.rows_per_transition == 2:
            empty = self.model.encode_prompts([None]).rows(torch.zeros(count, dtype=torch.long))
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            text = Conditioning.cat([empty, text])
        weights = latents.new_ones((len(latents), 1))
        noise_pred = self.bank.forward(
            latents.to(self.model.dtype), timesteps, text.embeds, weights, added_cond_kwargs=text.added
        ).float()
        if self.rows_per_transition == 2:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + self.config.guidance_scale * (conditional - unconditional)
        step = self.model.ddim_step(
            noise_pred, part.latents, part.timesteps, part.prev_timesteps, eta=self.config.eta, noise=None
        )
        return step.mean, step.std

    def random_steps(self) -> list[int]:
        """The steps of a path that are Gaussian and so have a KL: std at least MIN_STD."""
        timesteps, prev_timesteps = self.model.timesteps(self.config.num_inference_steps)
        zeros = torch.zeros(len(timesteps), 1, 1, 1)
        step = self.model.ddim_step(zeros, zeros, timesteps, prev_timesteps, eta=self.config.eta, noise=None)
        return [i for i, std in enumerate(step.std.tolist()) if std >= MIN_STD]
