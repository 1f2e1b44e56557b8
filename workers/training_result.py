"""The adapter's directory: what a finished run leaves and what is published."""

import json
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from blend.finetune.checkpoint import ADAPTER_FILE, read_state
from blend.finetune.held_out import Metrics
from workers.tensorboard import write_sheets
from workers.training_log import TENSORBOARD, write_metrics
from workers.training_report import Outcome, write_card

if TYPE_CHECKING:
    from workers.training import TrainJob

FILES = (ADAPTER_FILE, "README.md", "curve.png", "metrics.jsonl", "samples.png")


class FitResult(BaseModel):
    """A trained adapter and how it got there; paths are on the driver's disk."""

    model_config = ConfigDict(frozen=True)

    adapter_dir: Path  # weights, model card, metrics, curve and sample sheet: what is published
    metrics: list[dict[str, Any]]  # one per iteration, number 0 being the base
    base_mean: float  # held-out reward of the base
    tuned_mean: float
    base_std: float
    path_kl: float  # of the held-out images, in nats
    kl_weight: float  # alpha in force when the published adapter was made
    curve_png: Path
    samples_png: Path
    metrics_jsonl: Path


def write_result(job: "TrainJob", checkpoint: Path, output_dir: Path) -> FitResult:
    """Turn the last checkpoint into the adapter's directory, written beside and renamed.

    One that holds this result already is left as it is, so that publishing it again is publishing the same.
    """
    # matplotlib, which workers do without
    from workers.training_curve import draw_curve
    from workers.training_sheet import draw_sheet, row_pixels, sheet_prompts

    state = read_state(checkpoint)
    history: list[Metrics] = state["history"]
    outcome = Outcome.of(job.config, history)
    final = output_dir / "adapter"
    write_metrics(history, output_dir / "metrics.jsonl")
    if not _holds(final, checkpoint, history):
        partial = output_dir / f".adapter-{threading.get_ident()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shutil.copy2(checkpoint / ADAPTER_FILE, partial / ADAPTER_FILE)
        write_metrics(history, partial / "metrics.jsonl")
        draw_curve(job.config, history, partial / "curve.png")
        sheets = state["sheets"]
        draw_sheet(
            sheets,
            history,
            partial / "samples.png",
            kept=history[-1].get("kept_iteration"),
            prompts=sheet_prompts(job.config, job.held_out_prompts),
        )
        write_card(job.config, job.prompts, job.held_out_prompts, history, partial / "README.md")
        rows = {at: row_pixels(images).permute(2, 0, 1) for at, images in sheets.items()}
        write_sheets(output_dir / TENSORBOARD, rows)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    return FitResult(
        adapter_dir=final,
        metrics=history,
        base_mean=outcome.base["held_out_mean"],
        base_std=outcome.base["held_out_std"],
        tuned_mean=outcome.tuned["held_out_mean"],
        path_kl=outcome.tuned["held_out_path_kl"],
        kl_weight=outcome.alpha,
        curve_png=final / "curve.png",
        samples_png=final / "samples.png",
        metrics_jsonl=final / "metrics.jsonl",
    )


def _holds(directory: Path, checkpoint: Path, history: list[Metrics]) -> bool:
    if not all((directory / name).is_file() for name in FILES):
        return False
    same_weights = (directory / ADAPTER_FILE).read_bytes() == (checkpoint / ADAPTER_FILE).read_bytes()
    lines = "".join(json.dumps(metrics) + "\n" for metrics in history)
    return same_weights and (directory / "metrics.jsonl").read_text(encoding="utf-8") == lines
