"""`diffusion-blend pretrain`: reproduce the embedded sprites base model, its judge and its alignment reward."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Part(StrEnum):
    """What can be trained from nothing but the package's own art."""

    base = "base"
    judge = "judge"
    alignment = "alignment"


def pretrain(
    part: Annotated[Part, typer.Option(help="Which shipped part to train.")] = Part.base,
    output: Annotated[Path, typer.Option(help="Directory for the base model.")] = Path("outputs/sprites-base"),
    work: Annotated[Path, typer.Option(help="Checkpoints: a stopped run goes on from here.")] = Path(
        "outputs/pretrain"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (each part has its own default).")] = None,
    scenes: Annotated[int, typer.Option(min=64, help="Rendered scenes, base model only.")] = 65_536,
    codec_steps: Annotated[int, typer.Option(min=1, help="Autoencoder steps, base model only.")] = 1500,
    decoder_steps: Annotated[int, typer.Option(min=1, help="Further decoder steps, base model only.")] = 3000,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Pre-train the sprites world's models from the package's own art."""
    import torch

    from blend.sprites import build
    from blend.sprites.pretrain import PretrainPlan

    torch.set_num_threads(threads)
    if part is Part.judge:
        figures: dict[str, Any] = build.build_judge(_bars(), steps or 2500)
    elif part is Part.alignment:
        figures = build.build_alignment(_bars(), steps or 3000)
    else:
        plan = PretrainPlan(codec_steps=codec_steps, decoder_steps=decoder_steps, scenes=scenes)
        plan = replace(plan, steps=steps or plan.steps)
        figures = build.build_base(plan, work, output, _bars())
        typer.echo(f"base model written to {output}")
    for name, value in figures.items():
        typer.echo(f"  {name}: {value}")


def _bars() -> Any:
    """A progress callback that shows one bar per stage."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def show(stage: str, done: int, total: int, value: float) -> None:
        bar = bars.setdefault(stage, tqdm(total=total, desc=stage, initial=max(0, done - 1)))
        bar.update(done - bar.n)
        bar.set_postfix_str(f"{value:.4f}", refresh=False)
        if done >= total:
            bar.close()

    return show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(pretrain)
