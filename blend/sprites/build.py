"""Builds every trained part that the package ships for the sprites world: base model, judge, alignment reward."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.figure

from blend.rewards import alignment
from blend.sprites import judge as judging
from blend.sprites.captions import COLOURS, OBJECTS
from blend.sprites.export import (
    GUIDANCE_SCALE,
    STEPS,
    draw_sheet,
    export_base,
    measure_base,
    sample,
    sheet_prompts,
)
from blend.sprites.pretrain import (
    Pretrainer,
    PretrainPlan,
    Progress,
    prepare_codec,
    prepare_scenes,
    refine_decoder,
)
from blend.sprites.train_alignment import measure_alignment, train_alignment
from blend.sprites.vision import save_half


def build_base(plan: PretrainPlan, work: Path, output: Path, progress: Progress) -> dict[str, Any]:
    """Pre-train in `work` (or resume there) and write the diffusers directory with its card; returns the figures."""
    work.mkdir(parents=True, exist_ok=True)
    codec = prepare_codec(plan, work, progress)
    latents, tokens = prepare_scenes(plan, work, codec, progress)
    trainer = Pretrainer(plan, work, latents, tokens)
    trainer.run(progress)
    codec = refine_decoder(plan, work, codec, progress)
    pipeline = export_base(trainer, codec, output)
    figures = {
        "steps": trainer.step,
        "images_seen": trainer.step * plan.batch,
        "final_loss": trainer.losses[-1][1],
        "codec_psnr_db": json.loads((work / "decoder.json").read_text())["psnr_db"],
        **describe_base(pipeline, output),
    }
    write_card(figures, plan, trainer.losses, output)
    return figures


def describe_base(pipeline: Any, output: Path) -> dict[str, Any]:
    """Sample sheet and the judge's figures of a base model directory."""
    draw_sheet(sample(pipeline, sheet_prompts()), columns=10).save(output / "samples.png")
    judge = judging.load_judge()
    return {**measure_base(pipeline, judge), "judge_accuracy": judging.measure_accuracy(judge)["all"]}


def build_judge(progress: Progress, steps: int = 2500) -> dict[str, float]:
    """Train the judge and write its weights into the package; returns its accuracy on unseen renders."""
    judge = judging.train_judge(steps=steps, on_step=lambda step, loss: progress("judge", step + 1, steps, loss))
    save_half(judge, judging.WEIGHTS)
    return judging.measure_accuracy(judging.load_judge())


def build_alignment(progress: Progress, steps: int = 3000) -> dict[str, float]:
    """Train the alignment reward's encoder and write its weights into the package; returns how often it is right."""
    encoder = train_alignment(steps=steps, on_step=lambda step, loss: progress("alignment", step + 1, steps, loss))
    save_half(encoder, alignment.WEIGHTS)
    return measure_alignment(alignment.Alignment.shipped().encoder)


def write_card(figures: dict[str, Any], plan: PretrainPlan, losses: list[tuple[int, float]], output: Path) -> None:
    """README.md, loss.png and figures.json beside the weights."""
    record = {"plan": asdict(plan), "figures": figures, "loss": losses[:: max(1, len(losses) // 200)]}
    (output / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    _draw_losses(losses, output / "loss.png")
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors")) / 1e6
    (output / "README.md").write_text(
        _CARD.format(
            size=size,
            colours=", ".join(COLOURS),
            objects=", ".join(OBJECTS),
            count=len(OBJECTS),
            scenes=plan.scenes,
            guidance=GUIDANCE_SCALE,
            sampling_steps=STEPS,
            **figures,
        )
    )


def _draw_losses(losses: list[tuple[int, float]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="#3366cc", linewidth=1.2)
    axes.set(xlabel="step", ylabel="noise prediction error", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# sprites: the embedded base model

A small text-to-image latent diffusion model of flat vector sprites, 64 x 64 pixels, in plain diffusers format
({size:.1f} MB of fp16 weights): `StableDiffusionPipeline.from_pretrained(directory)` loads it.

![samples](samples.png)

*One prompt per object, four colour-object pairs never seen in training, ten prompts with two objects; guidance
{guidance:g}, {sampling_steps} DDIM steps, eta 1.*

## Vocabulary
Captions are "A red colored car." or "A blue cup and a green cell phone." (the first-named object stands on the left).
Colours: {colours}. Objects ({count}): {objects}.

## Data and licence
{scenes} scenes rendered by `blend.sprites.scene` from our own vector art (`blend/sprites/art.json`). Nothing else was
used. One colour of each object never appears. Data, art and weights: Apache-2.0.

## Training
`diffusion-blend pretrain --steps {steps}`: an AutoencoderTiny (4 latent channels, factor 4), then a
UNet2DConditionModel and a two-layer CLIPTextModel trained jointly for {steps} steps, {images_seen} images seen; noise
prediction, min-SNR-5 weights.

![loss](loss.png)

## Measured
By a classifier trained on renders and used for nothing else (right about {judge_accuracy:.1%} of unseen renders), on
prompts held out from fine-tuning:

| figure | value |
|---|---|
| colour right, one object ({single_images} images) | {colour_accuracy:.1%} |
| object right, one object | {object_accuracy:.1%} |
| colour right, one object in a colour never seen on it | {unseen_pair_colour_accuracy:.1%} |
| object right, the same images | {unseen_pair_object_accuracy:.1%} |
| both colours on the right objects, two objects ({pair_images} images) | {pair_accuracy:.1%} |
| autoencoder | {codec_psnr_db:.1f} dB PSNR |

## Limits
Only the captions above mean anything to it; other words are spelt in bytes it has never learnt.
"""
