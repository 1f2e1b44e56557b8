"""The diffusers-style face for notebooks: a few lines over the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from tqdm.auto import tqdm

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.model import load_model
from blend.preference import Preference


@dataclass(frozen=True, slots=True)
class BlendPipelineOutput:
    """Images in the order of the prompts, and the seeds that reproduce them."""

    images: list[Image.Image]
    seeds: list[int]


class DiffusionBlendPipeline:
    """One base model and its basis adapters, blended by weights at each call."""

    def __init__(self, engine: BlendEngine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        device: str = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a diffusers directory or Hub id and LoRA adapters by basis name; ModelError or AdapterError if unfit."""
        model = load_model(base, device=device, dtype=torch_dtype)
        bank = AdapterBank(model.unet)
        for name, path in (adapters or {}).items():
            bank.load(name, path)
        return cls(BlendEngine(model, bank))

    def __call__(
        self,
        prompt: str | Sequence[str],
        weights: Mapping[str, float] | None = None,
        kl_lambda: float = 1.0,
        method: str = "mpa",
        *,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> BlendPipelineOutput:
        """Return one image per prompt; without weights, the base model's.

        `seed` belongs to the first prompt, the next ones count on from it; a `generator` draws a seed for each; with
        neither, seeds are drawn at random and returned. Raises ValueError for what cannot be asked for, before any
        work, and DenoisingError when a sample stops being finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt is an empty list: give at least one prompt")
        if weights is None:
            preference = Preference.base()
        else:
            preference = Preference.parse(weights, kl_lambda, method, basis=self.engine.bank.names)
        seeds = _draw_seeds(len(prompts), seed, generator)
        samples = [
            Sample(
                prompt=text,
                preference=preference,
                seed=one,
                negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
                height=height,
                width=width,
            )
            for text, one in zip(prompts, seeds, strict=True)
        ]
        with tqdm(total=len(samples), unit="image", disable=not progress) as bar:
            outputs = self.engine.run(samples, lambda done, total: _show(bar, done, total))
        latents = []
        for output in outputs:
            if output.error is not None or output.latents is None:
                raise output.error or RuntimeError("a sample ended without latents")
            latents.append(output.latents)
        pixels = self.engine.decode(latents).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return BlendPipelineOutput([Image.fromarray(one) for one in pixels], seeds)


def _draw_seeds(count: int, seed: int | None, generator: torch.Generator | None) -> list[int]:
    if seed is not None:
        if generator is not None:
            raise ValueError("both seed and generator are given: use one of them")
        return list(range(seed, seed + count))
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    drawn: list[int] = torch.randint(2**31, (count,), generator=generator, device=generator.device).tolist()
    return drawn


def _show(bar: tqdm[None], done: int, total: int) -> None:
    # the bar counts images, the engine counts steps
    bar.n = math.floor(bar.total * done / total)
    bar.refresh()
