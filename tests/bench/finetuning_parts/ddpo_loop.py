"""A plain DDPO trainer, put together as the public ones are: what the speed of blend.finetune is compared with.

A diffusers pipeline's parts and a loop over its scheduler's steps, one batch of images after another; LoRA by PEFT; a
second UNet as the KL's reference; then for each batch one trained step at a time. It knows nothing of blend but the
settings of a run.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from blend.finetune.config import TrainConfig
from blend.rewards import Reward

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADVANTAGE_LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class Paths:
    """One sampled batch of B images over T steps."""

    latents: Tensor  # [B, T + 1, C, h, w] from noise to image
    timesteps: Tensor  # [B, T]
    log_probs: Tensor  # [B, T] mean over elements
    embeds: Tensor  # [B, L, D] of the prompts
    rewards: Tensor  # [B]


class DDPOLoop:
    """One adapter, its optimiser and the reference. The scheduler's last step must be noisy too (set_alpha_to_one off).

    Prompt, images, steps, guidance and loss follow `config`; the reward is one call per batch.
    """

    def __init__(self, source: str | Path, config: TrainConfig, reward: Reward) -> None:
        self.config = config
        self.reward = reward
        self.pipeline = StableDiffusionPipeline.from_pretrained(source, dtype=torch.float32, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            part.requires_grad_(False)
        self.unet, self.scheduler = self.pipeline.unet, self.pipeline.scheduler
        self.reference = copy.deepcopy(self.unet)
        torch.manual_seed(config.seed)  # PEFT draws from the global generator
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=TARGETS)
        self.unet.add_adapter(lora)
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=1e-4)
        self.generator = torch.Generator().manual_seed(config.seed)

    def epoch(self, prompts: Sequence[str], batch_size: int, train_steps: int) -> dict[str, float]:
        """Sample an image for each prompt, score, and take one optimiser step over `train_steps` steps of each path.

        Returns reward_mean, the mean loss, the largest |ratio - 1| (rounding alone) and rollout_seconds.
        """
        started = time.perf_counter()
        batches = [self.sample(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
        rolled_out = time.perf_counter()
        rewards = torch.cat([batch.rewards for batch in batches])
        gains = advantages(rewards, prompts).split(batch_size)
        losses, deviations = [], []
        self.optimizer.zero_grad()
        for batch, gain in zip(batches, gains, strict=True):
            count = len(batch.rewards)
            shuffled = torch.rand(count, self.config.num_inference_steps, generator=self.generator).argsort(1)
            for steps in shuffled[:, :train_steps].unbind(1):
                loss, deviation = self.losses(batch, steps, gain)
                (loss.sum() / (len(prompts) * train_steps)).backward()
                losses.append(loss.sum().item())
                deviations.append(deviation.max().item())
        nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        return {
            "reward_mean": rewards.mean().item(),
            "loss": sum(losses) / (len(prompts) * train_steps),
            "ratio_deviation": max(deviations),
            "rollout_seconds": rolled_out - started,
        }

    @torch.no_grad()
    def sample(self, prompts: Sequence[str]) -> Paths:
        """Denoise, decode and score one batch."""
        embeds, _ = self.pipeline.encode_prompt(list(prompts), "cpu", 1, False)
        self.scheduler.set_timesteps(self.config.num_inference_steps)
        size = self.unet.config.sample_size
        shape = (len(prompts), self.unet.config.in_channels, size, size)
        latents = torch.randn(shape, generator=self.generator)
        kept, log_probs = [latents], []
        for timestep in self.scheduler.timesteps:
            timesteps = timestep.expand(len(prompts))
            mean, std = self.transition(self.unet, latents, timesteps, embeds)
            latents = mean + std * torch.randn(shape, generator=self.generator)
            kept.append(latents)
            log_probs.append(log_density(latents, mean, std))
        vae = self.pipeline.vae
        images = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return Paths(
            torch.stack(kept, 1),
            self.scheduler.timesteps.expand(len(prompts), -1),
            torch.stack(log_probs, 1),
            embeds,
            self.reward(images, prompts),
        )

    def losses(self, batch: Paths, steps: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and |ratio - 1| [B] of step number steps[b] of each path: clipped PPO and KL to the reference."""
        rows = torch.arange(len(steps))
        latents, prev_latents = batch.latents[rows, steps], batch.latents[rows, steps + 1]
        timesteps = batch.timesteps[rows, steps]
        mean, std = self.transition(self.unet, latents, timesteps, batch.embeds)
        with torch.no_grad():
            base_mean, _ = self.transition(self.reference, latents, timesteps, batch.embeds)
        ratio = torch.exp(log_density(prev_latents, mean, std) - batch.log_probs[rows, steps])
        clip_range = self.config.clip_range
        policy = torch.maximum(-gains * ratio, -gains * ratio.clamp(1 - clip_range, 1 + clip_range))
        kl = ((mean - base_mean) ** 2 / (2 * std**2)).mean((1, 2, 3))
        return policy + self.config.kl_weight * kl, (ratio.detach() - 1).abs()

    def transition(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, h, w] and standard deviation [B, 1, 1, 1] of a DDIM step of the scheduler, with guidance."""
        if self.config.guidance_scale > 1:
            empty, _ = self.pipeline.encode_prompt("", "cpu", 1, False)
            both = torch.cat([empty.expand_as(embeds), embeds])
            rows, times = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            absent, given = unet(rows, times, encoder_hidden_states=both, return_dict=False)[0].chunk(2)
            noise_pred = absent + self.config.guidance_scale * (given - absent)
        else:
            noise_pred = unet(latents, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]
        alphas = self.scheduler.alphas_cumprod
        before = timesteps - self.scheduler.config.num_train_timesteps // self.config.num_inference_steps
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        alpha_prev = torch.where(before >= 0, alphas[before.clamp(min=0)], self.scheduler.final_alpha_cumprod)
        alpha_prev = alpha_prev.view(-1, 1, 1, 1)
        std = self.config.eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
        origin = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
        return alpha_prev.sqrt() * origin + (1 - alpha_prev - std**2).sqrt() * noise_pred, std


def log_density(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density [B] of values under Gaussians, mean over elements."""
    return torch.distributions.Normal(mean, std).log_prob(values).mean((1, 2, 3))


def advantages(rewards: Tensor, prompts: Sequence[str]) -> Tensor:
    """(r - mean) / std among the images of a prompt, [N], cut as in ddpo-pytorch."""
    found = torch.zeros_like(rewards)
    for prompt in set(prompts):
        members = torch.tensor([one == prompt for one in prompts])
        group = rewards[members]
        found[members] = (group - group.mean()) / (group.std(correction=0) + 1e-6)
    return found.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
