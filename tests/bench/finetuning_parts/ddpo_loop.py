"""A plain DDPO loop, as public trainers of diffusion policies are written: the rival of blend.finetune's speed.

One batch after the other is sampled with diffusers' own modules; then one batch and one denoising step after the other
is trained, LoRA by peft, with a second UNet as the reference of the KL. DDPO: arXiv 2305.13301; KL as in DPOK.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
KL_WEIGHT, CLIP_RANGE, GRAD_CLIP, LEARNING_RATE = 0.0025, 1e-4, 1.0, 4e-3


@dataclass(frozen=True)
class Batch:
    """A sampled batch of B images over T steps."""

    text: Tensor  # [B, L, D], or [2 B, L, D] with the empty prompt's first when guided
    latents: Tensor  # [T + 1, B, C, h, w]
    log_probs: Tensor  # [T, B], mean over elements
    rewards: Tensor  # [B]


class DDPOLoop:
    """Samples, scores and updates once per `iterate`."""

    def __init__(
        self,
        base: str,
        reward: Callable[[Tensor, Sequence[str]], Tensor],
        *,
        steps: int,
        guidance_scale: float = 1.0,
        batch_size: int = 8,
        rank: int = 4,
    ) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, torch_dtype=torch.float32)
        self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.scheduler.set_timesteps(steps)
        self.unet = self.pipeline.unet.requires_grad_(False)
        self.reference = copy.deepcopy(self.unet)
        torch.manual_seed(0)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.reward = reward
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size

    def iterate(self, prompts: Sequence[str], groups: Sequence[int], trained: int, seed: int) -> dict[str, Any]:
        """One outer loop over an image per prompt; `trained` steps of each batch: the first four and random others."""
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        size = self.batch_size
        batches = [self.sample(prompts[i : i + size], generator) for i in range(0, len(prompts), size)]
        sampled = time.perf_counter()
        rewards = torch.cat([batch.rewards for batch in batches])
        index = torch.tensor(groups)
        means = torch.stack([rewards[index == group].mean() for group in index.unique()])
        advantages = ((rewards - means[index]) / rewards.std().clamp_min(1e-6)).split(size)
        deviations = []
        self.optimizer.zero_grad()
        for batch, gains in zip(batches, advantages, strict=True):
            for step in self.choose_steps(trained, seed):
                loss, deviation = self.loss(batch, gains, step)
                (loss * batch.latents[0, 0].numel() / len(batches) / trained).backward()
                deviations.append(deviation)
        torch.nn.utils.clip_grad_norm_(self.parameters, GRAD_CLIP)
        self.optimizer.step()
        return {
            "reward_mean": rewards.mean().item(),
            "ratio_deviation": max(deviations),
            "seconds": time.perf_counter() - started,
            "rollout_seconds": sampled - started,
        }

    def choose_steps(self, trained: int, seed: int) -> list[int]:
        """All steps but the last, whose noise is next to none, or `trained` of them."""
        every = list(range(len(self.pipeline.scheduler.timesteps) - 1))
        first, rest = every[:4], every[4:]
        if trained <= len(first):
            return first[:trained]
        return first + random.Random(seed).sample(rest, min(trained - len(first), len(rest)))

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], generator: torch.Generator) -> Batch:
        """Denoise one batch and score it."""
        text = self.encode(prompts)
        config = self.unet.config
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        latents = [torch.randn(shape, generator=generator)]
        log_probs = []
        for step in range(len(self.pipeline.scheduler.timesteps)):
            mean, std = self.transition(self.unet, latents[-1], step, text)
            latents.append(mean + std * torch.randn(shape, generator=generator))
            log_probs.append(log_density(latents[-1], mean, std))
        vae = self.pipeline.vae
        images = vae.decode(latents[-1] / vae.config.scaling_factor, return_dict=False)[0]
        images = (images / 2 + 0.5).clamp(0, 1)
        return Batch(text, torch.stack(latents), torch.stack(log_probs), self.reward(images, prompts))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text rows, with those of the empty prompt first when guided."""
        guided = self.guidance_scale > 1
        positive, negative = self.pipeline.encode_prompt(list(prompts), "cpu", 1, guided)
        return torch.cat([negative, positive]) if guided else positive

    def transition(self, unet: torch.nn.Module, latents: Tensor, step: int, text: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, h, w] and std of x_{t-1} given x_t."""
        scheduler = self.pipeline.scheduler
        timestep = scheduler.timesteps[step]
        guided = len(text) == 2 * len(latents)
        noise_pred = unet(torch.cat([latents, latents]) if guided else latents, timestep, text, return_dict=False)[0]
        if guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + self.guidance_scale * (conditional - unconditional)
        mean = scheduler.step(
            noise_pred, timestep, latents, eta=1.0, variance_noise=torch.zeros_like(latents), return_dict=False
        )[0]
        previous = timestep - scheduler.config.num_train_timesteps // len(scheduler.timesteps)
        return mean, scheduler._get_variance(timestep, previous).clamp_min(1e-12).sqrt()

    def loss(self, batch: Batch, gains: Tensor, step: int) -> tuple[Tensor, float]:
        """PPO's clipped loss and the KL to the second UNet, for one step of one batch."""
        mean, std = self.transition(self.unet, batch.latents[step], step, batch.text)
        with torch.no_grad():
            base_mean, _ = self.transition(self.reference, batch.latents[step], step, batch.text)
        ratio = torch.exp(log_density(batch.latents[step + 1], mean, std) - batch.log_probs[step])
        policy = torch.maximum(-gains * ratio, -gains * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
        kl = ((mean - base_mean) ** 2).flatten(1).mean(1) / (2 * std**2)
        return (policy + KL_WEIGHT * kl).mean(), (ratio.detach() - 1).abs().max().item()


def log_density(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log density [B] up to a constant, mean over elements."""
    return -((value.detach() - mean) ** 2).flatten(1).mean(1) / (2 * std**2) - std.log()
