"""Loads a Stable-Diffusion-class model and does what is not denoising: text to embeddings, latents to pixels.

Any diffusers directory or Hub id whose model_index.json names a StableDiffusionPipeline or a StableDiffusionXLPipeline
will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blend.conditioning import Conditioning, PromptEncoder, time_ids
from blend.ddim import DDIMStep, ddim_step
from blend.model_files import ModelError, kind_of, load_parts, model_hash, read_index

__all__ = ["DiffusionModel", "ModelError", "load_model", "model_hash"]


@dataclass
class DiffusionModel:
    """One loaded base model; weights frozen, in evaluation mode. Its adapters live in an AdapterBank over `unet`."""

    unet: nn.Module
    vae: Any
    text: PromptEncoder
    scheduler: Any  # DDIMScheduler made from the directory's own scheduler config; read, never stepped
    device: torch.device
    dtype: torch.dtype
    prediction_type: str  # "epsilon" | "v_prediction"
    default_height: int  # pixels
    default_width: int
    latent_channels: int
    vae_scale_factor: int  # pixels per latent cell
    _timesteps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def clip_sample_range(self) -> float | None:
        """The bound on the predicted x_0 that the scheduler config asks for; None: no clipping."""
        config = self.scheduler.config
        return float(config.clip_sample_range) if config.clip_sample else None

    def latents_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of one sample; raises ModelError unless the pixels fill whole latent cells."""
        factor = self.vae_scale_factor
        for name, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < factor or value % factor:
                raise ModelError(f"{name} is {value!r}: use a positive multiple of {factor}")
        return self.latent_channels, height // factor, width // factor

    def encode_prompts(
        self, prompts: Sequence[str | None], height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """Return one row for each prompt of an image of that size (default: the model's own); cached per prompt.

        None is the absent negative prompt. Text past the tokenizer's limit is cut off, as diffusers does.
        """
        embeds, pooled = self.text.encode(prompts)
        if pooled is None:
            return Conditioning(embeds)
        size = time_ids(
            self.default_height if height is None else height,
            self.default_width if width is None else width,
            dtype=self.dtype,
            device=self.device,
        )
        return Conditioning(embeds, {"text_embeds": pooled, "time_ids": size.expand(len(prompts), -1)})

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return float32 images [B, 3, H, W] in [0, 1] for latents [B, C, h, w].

        Each is decoded alone, so that its bits do not depend on the others.
        """
        return self.decode_traced(latents)

    def decode_traced(self, latents: Tensor) -> Tensor:
        """Return what `decode` returns, with gradients to the latents; pixels that are clamped have none."""
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (latents.new_tensor(config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
            scaled = latents * std / config.scaling_factor + mean
        else:
            scaled = latents / config.scaling_factor + (config.get("shift_factor") or 0)
        scaled = scaled.to(self.device, self.vae.dtype)
        images = [self.vae.decode(one[None], return_dict=False)[0][0] for one in scaled]
        return torch.stack(images).float().div(2).add(0.5).clamp(0, 1)

    def timesteps(self, num_inference_steps: int) -> tuple[Tensor, Tensor]:
        """Return (timesteps [T], prev_timesteps [T]) as long tensors on the CPU; -1 ends the chain.

        Raises ModelError when the model's schedule has no such number of steps.
        """
        steps, limit = num_inference_steps, int(self.scheduler.config.num_train_timesteps)
        # before the cache is asked: True and 1.0 are the same key as 1
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= limit:
            raise ModelError(f"num_inference_steps is {steps!r}: use an integer from 1 to {limit}")
        if steps not in self._timesteps:
            self.scheduler.set_timesteps(steps)
            timesteps = self.scheduler.timesteps.cpu().long()
            if int(timesteps.max()) >= limit:
                raise ModelError(
                    f"num_inference_steps is {steps}: this model's schedule reaches past {limit}; use fewer"
                )
            self._timesteps[steps] = (timesteps, (timesteps - limit // steps).clamp(min=-1))
        return self._timesteps[steps]

    def ddim_step(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        timesteps: Tensor,
        prev_timesteps: Tensor,
        *,
        eta: Tensor | float,
        noise: Tensor | None,
    ) -> DDIMStep:
        """Take `blend.ddim.ddim_step` under this model's own noise schedule."""
        return ddim_step(
            noise_pred,
            sample,
            timesteps,
            prev_timesteps,
            self.scheduler.alphas_cumprod,
            eta=eta,
            noise=noise,
            prediction_type=self.prediction_type,
            final_alpha_cumprod=self.scheduler.final_alpha_cumprod,
            clip_sample_range=self.clip_sample_range,
        )


def load_model(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionModel:
    """Load a diffusers directory, or a Hub id, of the Stable Diffusion 1, Stable Diffusion 2 or SDXL kind.

    Raises ModelError when there is none at `source`, when files are missing or damaged, or when the model is of
    another kind (an SDXL refiner, inpainting, distilled guidance, flow matching).
    """
    device = torch.device(device)
    index = read_index(source)
    kind = kind_of(source, index)
    parts = load_parts(source, kind, index, dtype)
    unet, vae = parts["unet"], parts["vae"]
    # as diffusers: SDXL's decoder overflows in float16, those of the others may claim to
    if "text_encoder_2" in parts and dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.to(torch.float32)
    for module in (unet, vae, *(parts[part] for part in kind.encoders)):
        module.requires_grad_(False).eval().to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = unet.config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return DiffusionModel(
        unet=unet,
        vae=vae,
        text=PromptEncoder(
            [parts[part] for part in kind.tokenizers],
            [parts[part] for part in kind.encoders],
            device=device,
            dtype=dtype,
            zeros_for_none="text_encoder_2" in parts and index.get("force_zeros_for_empty_prompt", True),
        ),
        scheduler=parts["scheduler"],
        device=device,
        dtype=dtype,
        prediction_type=parts["scheduler"].config.prediction_type,
        default_height=height * factor,
        default_width=width * factor,
        latent_channels=unet.config.in_channels,
        vae_scale_factor=factor,
    )
