"""Loads a Stable-Diffusion-class model and does what is not denoising: text to embeddings, latents to pixels.

Any diffusers directory or Hub id whose model_index.json names a StableDiffusionPipeline will do.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blend.conditioning import Conditioning, PromptEncoder, time_ids
from blend.ddim import PREDICTION_TYPES, DDIMStep, ddim_step

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_HASHED = {".safetensors", ".json", ".txt"}


class ModelError(ValueError):
    """A base model that cannot be loaded or whose kind the blend does not support."""


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
        scaled = (latents / self.vae.config.scaling_factor).to(self.device, self.dtype)
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
    """Load a diffusers directory, or a Hub id, of the Stable Diffusion 1 and 2 kind.

    Raises ModelError when there is none at `source`, when files are missing or damaged, or when the model is of
    another kind (SDXL, inpainting, distilled guidance, flow matching).
    """
    index = _read_index(source)
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise ModelError(
            f"{source} is a {index.get('_class_name')}: use a directory or Hub id of a StableDiffusionPipeline"
        )
    try:
        parts = {part: _load_part(source, part, index, dtype) for part in _PARTS}
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source} cannot be loaded ({error}): download or save the model again") from error
    unet, vae, config = parts["unet"], parts["vae"], parts["scheduler"].config
    _check_kind(source, unet, vae, config)
    for part in ("unet", "vae", "text_encoder"):
        parts[part].requires_grad_(False).eval().to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = unet.config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return DiffusionModel(
        unet=unet,
        vae=vae,
        text=PromptEncoder([parts["tokenizer"]], [parts["text_encoder"]], device=torch.device(device), dtype=dtype),
        scheduler=parts["scheduler"],
        device=torch.device(device),
        dtype=dtype,
        prediction_type=config.prediction_type,
        default_height=height * factor,
        default_width=width * factor,
        latent_channels=unet.config.in_channels,
        vae_scale_factor=factor,
    )


def model_hash(source: str | Path) -> str:
    """Return the base model's identity: sha256 over the sorted (relative name, sha256) of what it is made of.

    Counted are model_index.json and the .safetensors, .json and .txt files of the parts that are loaded; model cards
    and safety checkers may change freely. Raises ModelError unless `source` is a local diffusers directory.
    """
    root = Path(source)
    if not (root / "model_index.json").is_file():
        raise ModelError(f"{source} is no local diffusers directory: give one that holds model_index.json")
    files = [root / "model_index.json"]
    files += [file for part in _PARTS for file in (root / part).rglob("*") if file.suffix in _HASHED]
    lines = []
    for file in files:
        with file.open("rb") as opened:
            lines.append(f"{file.relative_to(root).as_posix()} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _read_index(source: str | Path) -> dict[str, Any]:
    directory = Path(source)
    if directory.is_dir():
        file = directory / "model_index.json"
        if not file.is_file():
            raise ModelError(f"{source} holds no model_index.json: give the top folder of a diffusers model")
        try:
            index: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise ModelError(f"{file} is no JSON ({error}): download or save the model again") from error
        return index
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(str(source)))
    except Exception as error:
        raise ModelError(
            f"no model at {source!r}: give an existing diffusers directory or a reachable Hub id ({error})"
        ) from error


def _load_part(source: str | Path, part: str, index: dict[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import DDIMScheduler

    if part == "scheduler":
        config = dict(DDIMScheduler.load_config(str(source), subfolder=part))
        # schedulers without this field never clip; DDIM's own default would clamp unbounded latents
        config.setdefault("clip_sample", False)
        return DDIMScheduler.from_config(config)
    library, name = index.get(part) or (None, None)
    if library not in ("diffusers", "transformers") or name is None:
        raise ModelError(f"{source}: its {part} is {library}.{name}: use a class of diffusers or transformers")
    if part == "unet" and name != "UNet2DConditionModel":
        raise ModelError(f"{source}: its unet is a {name}: use a model with a UNet2DConditionModel")
    kind = getattr(importlib.import_module(library), name)
    if part == "tokenizer":
        return kind.from_pretrained(str(source), subfolder=part)
    dtype_name = "dtype" if library == "transformers" else "torch_dtype"
    return kind.from_pretrained(str(source), subfolder=part, use_safetensors=True, **{dtype_name: dtype})


def _check_kind(source: str | Path, unet: Any, vae: Any, scheduler_config: Any) -> None:
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"{source}: its unet takes {unet.config.in_channels} channels, its vae makes {vae.config.latent_channels}"
            " (inpainting?): use a text-to-image model"
        )
    for option in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type"):
        if unet.config.get(option) is not None:
            raise ModelError(f"{source}: its unet has {option}={unet.config[option]!r}: use a plain SD 1 or 2 model")
    if scheduler_config.prediction_type not in PREDICTION_TYPES:
        raise ModelError(
            f"{source}: prediction_type is {scheduler_config.prediction_type!r}:"
            f" use one of {', '.join(PREDICTION_TYPES)}"
        )
    if scheduler_config.thresholding:
        raise ModelError(f"{source}: its scheduler uses thresholding, which is unfit for latents: turn it off")
    if scheduler_config.get("rescale_betas_zero_snr") and scheduler_config.prediction_type == "epsilon":
        raise ModelError(f"{source}: rescale_betas_zero_snr leaves nothing to divide by with epsilon: use v_prediction")
