"""The baselines of one request: K merged UNets one after another, and one UNet whose PEFT adapters take turns.

As in the paper's code: a DDIMScheduler per request, per step and adapter one guided forward of 2 rows.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from engine_parts.workload import Workload
from torch import Tensor

from blend.engine import Sample

Predict = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Sequential:
    """Requests one after another; `predict` runs one adapter's guided forward."""

    def __init__(self, workload: Workload, predict: Predict) -> None:
        self._basis = workload.basis
        self._predict = predict
        model = workload.engine.model
        self._shape = model.latents_shape(model.default_height, model.default_width)
        self._scheduler_config = model.scheduler.config
        encoded = {prompt: model.encode_prompts([prompt]) for prompt in ("", *workload.prompts)}
        self._embeds = {prompt: getattr(rows, "embeds", rows) for prompt, rows in encoded.items()}

    def run(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return each sample's latents [C, h, w]."""
        with torch.inference_mode():
            return [self._denoise(sample) for sample in samples]

    def _denoise(self, sample: Sample) -> Tensor:
        scheduler = DDIMScheduler.from_config(self._scheduler_config)
        scheduler.set_timesteps(sample.num_inference_steps)
        weights = [sample.preference.weights[name] for name in self._basis]
        embeds = torch.cat([self._embeds[sample.negative_prompt], self._embeds[sample.prompt]])
        generator = torch.Generator().manual_seed(sample.seed)
        latents = torch.randn(self._shape, generator=generator)[None]
        for timestep in scheduler.timesteps:
            blended = torch.zeros_like(latents)
            for k, weight in enumerate(weights):
                uncond, text = self._predict(k, torch.cat([latents, latents]), timestep, embeds).chunk(2)
                blended += weight * (uncond + sample.guidance_scale * (text - uncond))
            noise = torch.randn(self._shape, generator=generator)[None]
            latents = scheduler.step(blended, timestep, latents, eta=sample.eta, variance_noise=noise).prev_sample
        return latents[0]


def merged_unets(workload: Workload) -> Sequential:
    """K whole UNets, each adapter merged into its own ahead of time: no LoRA arithmetic is left to pay for."""
    unets = []
    for name in workload.basis:
        unet = _load_unet(workload)
        _load_adapter(unet, workload, name)
        unet.fuse_lora()
        unet.unload_lora()
        unets.append(unet)

    def predict(k: int, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        return unets[k](latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    return Sequential(workload, predict)


def peft_loop(workload: Workload) -> Sequential:
    """One UNet with K PEFT adapters, `set_adapter` before each forward."""
    unet = _load_unet(workload)
    for name in workload.basis:
        _load_adapter(unet, workload, name)

    def predict(k: int, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        unet.set_adapter(workload.basis[k])
        return unet(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    return Sequential(workload, predict)


def _load_unet(workload: Workload) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(workload.bundle.base_path, subfolder="unet", use_safetensors=True)
    return unet.requires_grad_(False).eval()


def _load_adapter(unet: UNet2DConditionModel, workload: Workload, name: str) -> None:
    file = "pytorch_lora_weights.safetensors"
    # with another prefix diffusers loads nothing and only warns
    unet.load_lora_adapter(workload.bundle.adapters[name], prefix="unet", adapter_name=name, weight_name=file)
