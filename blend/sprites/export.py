"""Writes the pre-trained parts as a Stable-Diffusion-style directory with model card, loss curve and sample sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from blend.sprites.captions import COLOURS, OBJECTS, Thing, pair_prompts, single_prompts, write_caption
from blend.sprites.codec import clean_config
from blend.sprites.judge import Judge
from blend.sprites.pretrain import Pretrainer, build_scheduler

GUIDANCE_SCALE = 3.0
STEPS = 20


def export_base(trainer: Pretrainer, codec: AutoencoderTiny, directory: Path) -> StableDiffusionPipeline:
    """Save the averaged weights in half precision as a diffusers directory; returns the pipeline read back in fp32."""
    trainer.use_average()
    pipeline = StableDiffusionPipeline(
        vae=codec,
        text_encoder=trainer.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(trainer.work / "tokenizer"),
        unet=trainer.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(directory)
    clean_config(directory / "vae")
    return load_base(directory)


def load_base(directory: Path) -> StableDiffusionPipeline:
    """The exported directory as diffusers' own pipeline, fp32, without its progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(directory), dtype=torch.float32, safety_checker=None)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    batch: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> Tensor:
    """Pictures [B, 3, 64, 64] in [0, 1], one per prompt, by diffusers' pipeline with DDIM, eta 1."""
    pictures = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(chunk))]
        pictures.append(
            pipeline(
                chunk,
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                eta=1.0,
                generator=generators,
                output_type="pt",
            ).images.float()
        )
        if on_done is not None:
            on_done(start + len(chunk))
    return torch.cat(pictures)


def measure_base(
    pipeline: StableDiffusionPipeline, judge: Judge, *, seeds: int = 4, guidance_scale: float = GUIDANCE_SCALE
) -> dict[str, Any]:
    """The judge's figures over the test prompts: singles (48 prompts, 16 of them pairs never seen) and pairs (96)."""
    singles, pairs = single_prompts("test") * seeds, pair_prompts("test") * max(1, seeds // 2)
    one = judge.judge(sample(pipeline, singles, guidance_scale=guidance_scale, seed=1000), singles)
    two = judge.judge(sample(pipeline, pairs, guidance_scale=guidance_scale, seed=2000), pairs)
    unseen = torch.tensor([index % 48 < 16 for index in range(len(singles))])
    return {
        "guidance_scale": guidance_scale,
        "single_images": len(singles),
        "colour_accuracy": _share(one.colours),
        "object_accuracy": _share(one.objects),
        "unseen_pair_colour_accuracy": _share(one.colours[unseen]),
        "unseen_pair_object_accuracy": _share(one.objects[unseen]),
        "pair_images": len(pairs),
        "pair_accuracy": _share(two.binding),
        "pair_colours_accuracy": _share(two.colours),
        "pair_objects_accuracy": _share(two.objects),
    }


def draw_sheet(pictures: Tensor, *, columns: int = 10, scale: int = 2) -> Image.Image:
    """Pictures [B, 3, H, W] in [0, 1] side by side, `columns` to a row, each pixel `scale` pixels wide."""
    rows = [torch.cat(list(pictures[start : start + columns]), dim=2) for start in range(0, len(pictures), columns)]
    width = rows[0].shape[2]
    padded = [torch.nn.functional.pad(row, (0, width - row.shape[2])) for row in rows]
    pixels = torch.cat(padded, dim=1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    sheet = Image.fromarray(pixels)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def sheet_prompts() -> list[str]:
    """One prompt per object for the sample sheet's two first rows, then ten with two objects."""
    singles = [write_caption((Thing(COLOURS[index % len(COLOURS)], name),)) for index, name in enumerate(OBJECTS)]
    return [*singles, *single_prompts("test")[:4], *pair_prompts("test", 10)]


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)
