"""The diffusers-style face for notebooks: a few lines over the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from blend.adapters import AdapterBank
from blend.bundle import Bundle, Defaults, OpenBundle, find_base, read_bundle
from blend.engine import BlendEngine, Sample
from blend.model import load_model, model_hash
from blend.preference import Preference

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
_SET_BY_THE_CALL = {"prompt", "preference", "seed", "negative_prompt", "num_inference_steps", "guidance_scale"}
_NOT_SHOWN = {"record", "measure_kl"}  # they fill what only the engine's own Output carries

Images = list[Image.Image] | list[list[Image.Image]] | Tensor | NDArray[np.float32]
Weights = Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class BlendPipelineOutput:
    """Images, one for each seed: prompt by prompt, num_images_per_prompt of each.

    By output_type: "pil" a list of B images; "pt" [B, 3, H, W] and "np" [B, H, W, 3], float32 in [0, 1]; "latent"
    [B, C, h, w]. Of a grid one such row per preference, all from the same seeds: a list of lists, or [rows, B, ...].
    """

    images: Images
    seeds: list[int]


class DiffusionBlendPipeline:
    """One base model and its basis adapters, blended by weights at each call."""

    def __init__(self, engine: BlendEngine, defaults: Defaults | None = None) -> None:
        """defaults: what a call uses where it says nothing; diffusers' own unless given."""
        self.engine = engine
        self.defaults = defaults or Defaults()

    @classmethod
    def from_bundle(
        cls,
        bundle: str | Path | OpenBundle,
        *,
        base: str | Path | None = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a directory that `diffusion-blend registry export` wrote, or what workers.bundles.open_bundle returns.

        `base`: where the base model lies on this machine, when not where the bundle says. Calls then use the steps,
        guidance, method and size that the bundle recommends. Raises ManifestError, ModelError or AdapterError.
        """
        return cls._load(read_bundle(bundle, base), device, torch_dtype)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a base ("sprites", a diffusers directory or Hub id) and LoRA adapters by basis name.

        Raises ModelError or AdapterError if unfit; an adapter whose file names another base is.
        """
        path = find_base(base)
        paths = {name: Path(one) for name, one in (adapters or {}).items()}
        return cls._load(Bundle(path, model_hash(path), paths, Defaults()), device, torch_dtype)

    @classmethod
    def _load(cls, bundle: Bundle, device: str | torch.device, dtype: torch.dtype) -> Self:
        model = load_model(bundle.base_path, device=device, dtype=dtype)
        bank = AdapterBank(model.unet, base_hash=bundle.base_sha256)
        for name, path in bundle.adapters.items():
            bank.load(name, path)
        return cls(BlendEngine(model, bank), bundle.defaults)

    @property
    def basis(self) -> tuple[str, ...]:
        """The names that `weights` may give numbers to."""
        return self.engine.bank.names

    def __call__(
        self,
        prompt: str | Sequence[str],
        weights: Weights | Iterable[Weights] = None,
        kl_lambda: float | Iterable[float] = 1.0,
        method: str | Iterable[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        progress: bool = False,
        **options: Any,
    ) -> BlendPipelineOutput:
        """Return one image per prompt; without weights, the base model's.

        `weights` sum to 1. They, `kl_lambda` and `method` may each be a list: the images are then a grid, one row per
        entry (None among the weights is the base model), and all rows are denoised together from the same seeds.
        `seed` belongs to the first image, the next ones count on from it; a `generator` draws a seed for each; with
        neither, seeds are drawn at random and returned. `options` are other fields of blend.Sample: eta, solver,
        height, width, guidance_interval, row_budget and so on. Raises TypeError for an option that is none, ValueError
        for what cannot be asked for, before any work, and DenoisingError when a sample stops being finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}: use one of {', '.join(OUTPUT_TYPES)}")
        rows, is_grid = self._preferences(weights, kl_lambda, method)
        texts = _texts(prompt, negative_prompt, num_images_per_prompt)
        seeds = _draw_seeds(len(texts), seed, generator)
        settings = self._settings(num_inference_steps, guidance_scale, options)
        samples = [
            Sample(prompt=text, preference=preference, seed=one, negative_prompt=negative, **settings)
            for preference in rows
            for (text, negative), one in zip(texts, seeds, strict=True)
        ]
        images = self._images(self._denoise(samples, progress), output_type)
        return BlendPipelineOutput(_in_rows(images, len(rows)) if is_grid else images, seeds)

    def _preferences(self, weights: Any, kl_lambda: Any, method: Any) -> tuple[list[Preference], bool]:
        """Return the preference of each row, and whether any dial was a list."""
        if weights is None and (_is_list(kl_lambda) or kl_lambda not in (0, 1) or method is not None):
            raise ValueError(
                f"kl_lambda is {kl_lambda!r} and method {method!r}, but there are no weights:"
                f" give weights over {', '.join(self.basis) or 'adapters (none are loaded)'}"
            )
        dials = {"weights": weights, "kl_lambda": kl_lambda, "method": method}
        listed = {name: list(dial) for name, dial in dials.items() if _is_list(dial)}
        lengths = {name: len(dial) for name, dial in listed.items()}
        if 0 in lengths.values() or len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"lists of dials give one row each ({found}): use equal lengths of at least 1")
        count = next(iter(lengths.values()), 1)
        rows = [[listed[name][i] if name in listed else dials[name] for name in dials] for i in range(count)]
        return [self._preference(*row) for row in rows], bool(listed)

    def _preference(self, weights: Weights, kl_lambda: float, method: str | None) -> Preference:
        if weights is None:
            return Preference.base()
        method = self.defaults.method if method is None else method
        return Preference.parse(weights, kl_lambda, method, basis=self.basis)

    def _settings(self, steps: int | None, guidance: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
        known = [field.name for field in fields(Sample) if field.name not in _SET_BY_THE_CALL | _NOT_SHOWN]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}: besides the call's own arguments use {', '.join(known)}")
        return {
            "num_inference_steps": self.defaults.num_inference_steps if steps is None else steps,
            "guidance_scale": self.defaults.guidance_scale if guidance is None else guidance,
            "height": self.defaults.height,
            "width": self.defaults.width,
            **options,
        }

    def _denoise(self, samples: Sequence[Sample], progress: bool) -> list[Tensor]:
        with tqdm(total=len(samples), unit="image", disable=not progress) as bar:
            outputs = self.engine.run(samples, lambda done, total: _show(bar, done, total))
        latents = []
        for output in outputs:
            if output.error is not None or output.latents is None:
                raise output.error or RuntimeError("a sample ended without latents")
            latents.append(output.latents)
        return latents

    def _images(self, latents: Sequence[Tensor], output_type: str) -> list[Image.Image] | Tensor | NDArray[np.float32]:
        if output_type == "latent":
            return torch.stack(list(latents))
        images = self.engine.decode(latents)
        if output_type == "pt":
            return images
        pixels = images.permute(0, 2, 3, 1).cpu()
        if output_type == "np":
            return np.asarray(pixels.numpy(), dtype=np.float32)
        return [Image.fromarray(one) for one in pixels.mul(255).round().byte().numpy()]


def _is_list(dial: object) -> bool:
    return isinstance(dial, Iterable) and not isinstance(dial, str | Mapping)


def _in_rows(images: Any, rows: int) -> Images:
    if isinstance(images, list):
        columns = len(images) // rows
        return [images[start : start + columns] for start in range(0, len(images), columns)]
    reshaped: Tensor | NDArray[np.float32] = images.reshape(rows, -1, *images.shape[1:])
    return reshaped


def _texts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, images_per_prompt: int
) -> list[tuple[str, str]]:
    """Return (prompt, negative prompt) of each image."""
    if isinstance(images_per_prompt, bool) or not isinstance(images_per_prompt, int) or images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {images_per_prompt!r}: use an integer >= 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list: give at least one prompt")
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt or ""] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"negative_prompt lists {len(negatives)} texts for {len(prompts)} prompts: give one, or one for each prompt"
        )
    return [pair for pair in zip(prompts, negatives, strict=True) for _ in range(images_per_prompt)]


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
