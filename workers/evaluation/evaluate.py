"""Evaluate a bundle: plan the grid, score it, analyse it, and write tables, figures and the report.

Everything that can be wrong with a run file is found before the first image.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from blend.rewards import RewardError, load_reward
from infra.manifests import canonical
from workers.bundles import LoadedBundle
from workers.evaluation.analysis import analyse
from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.files import write_files
from workers.evaluation.grid import plan_cells
from workers.evaluation.pictures import Pixels, pictured_cells
from workers.evaluation.report import Facts
from workers.evaluation.scoring import Item, Job, Record, plan_items, score_all

# What changes how the work is done, but not its result.
PLACEMENT = {"bundle", "num_workers", "gpus_per_worker", "reward_actors", "reward_gpus"}
# Columns that are there whatever is evaluated.
COLUMNS = {
    *("cell", "method", "kl_lambda", "prompt", "prompt_index", "seed", "diversity", "rows", "path_kl", "seconds"),
    *("prompts", "samples", "weighted_gain", "share", "switch_share", "pareto"),
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the scoring is; seconds_left is None before the first result."""

    done: int
    total: int
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked evaluation: what will be done, and the digest that names its result."""

    config: EvaluateConfig
    job: Job
    objectives: tuple[str, ...]
    versions: dict[str, str]
    digest: str


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Samples, one row each; the summary, one row per cell; and the files in the order of writing."""

    frame: pd.DataFrame
    summary: pd.DataFrame
    files: list[Path]
    facts: Facts


def plan(config: EvaluateConfig, bundle: LoadedBundle, adapter_rewards: Mapping[str, str]) -> Plan:
    """Resolve and check a run against its bundle; `adapter_rewards` says what each adapter was tuned for.

    Raises EvaluationError naming the key of the run file.
    """
    basis = tuple(bundle.adapters)
    objectives = tuple(adapter_rewards[name] for name in basis)
    names = tuple(dict.fromkeys((*objectives, *config.rewards)))
    defaults = bundle.record.defaults
    config = config.model_copy(
        update={
            "prompts": config.read_prompts(),
            "rewards": names,
            "num_inference_steps": config.num_inference_steps or defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            "height": config.height or defaults.height,
            "width": config.width or defaults.width,
        }
    )
    if len(config.prompts) * len(config.seeds) < 2:
        raise EvaluationError("prompts: one prompt with one seed says nothing; give more of either", "prompts")
    if "ls" in config.methods and config.eta == 0:
        raise EvaluationError("eta = 0: method ls needs eta > 0; raise eta or leave ls out of methods", "eta")
    _refuse_columns(names)
    cells = plan_cells(config, basis)
    versions = {name: _reward_version(name) for name in names}
    identity = {
        "config": config.model_dump(mode="json", exclude=PLACEMENT),
        "bundle": bundle.record.digest,
        "rewards": versions,
        "software": version("diffusion-blend"),
    }
    digest = hashlib.sha256(canonical(identity)).hexdigest()
    job = Job(config, bundle, basis, tuple(cells), tuple(config.prompts), names)
    return Plan(config, job, objectives, versions, digest)


def _refuse_columns(rewards: Sequence[str]) -> None:
    """A reward is a column of the tables: it may not take the place of another one."""
    for name in rewards:
        if name in COLUMNS or name.startswith("w_") or name.endswith(("_low", "_high", "_gain")):
            raise EvaluationError(
                f"rewards: {name!r} is also a column of the tables: give the plugin another name", "rewards"
            )


def _reward_version(name: str) -> str:
    try:
        return load_reward(name).version
    except (RewardError, OSError) as error:
        raise EvaluationError(f"rewards: {error}", "rewards") from error


def evaluate(
    planned: Plan, output_dir: str | Path, on_progress: Callable[[Progress], None] | None = None
) -> EvaluationResult:
    """Do what was planned and write its files into output_dir; a bar on the terminal shows time left.

    Raises EvaluationError when generation or a reward fails.
    """
    job = planned.job
    rows = pictured_cells(job.cells)
    records, pictures = _score(job, plan_items(job, rows), on_progress)
    frame = _frame(records, job)
    analysis = analyse(frame, job.cells, job.basis, planned.objectives, job.rewards, planned.config)
    facts = _facts(planned, len(frame))
    files = write_files(Path(output_dir), planned.config, facts, frame, analysis, pictures, rows)
    return EvaluationResult(frame, analysis.summary, files, facts)


def _score(
    job: Job, items: list[Item], on_progress: Callable[[Progress], None] | None
) -> tuple[list[Record], dict[tuple[int, int], Pixels]]:
    records: list[Record] = []
    pictures: dict[tuple[int, int], Pixels] = {}
    total = len(job.cells) * len(job.prompts) * len(job.config.seeds)
    started, rows_done = time.monotonic(), 0.0
    rows_total = sum(_expected_rows(job, item) for item in items)
    with tqdm(total=total, desc="evaluate", unit="image", disable=None) as bar:
        for scored in score_all(job, items):
            records += scored.records
            pictures |= {(scored.item.cell, prompt): image for prompt, image in scored.pictures.items()}
            rows_done += _expected_rows(job, scored.item)
            bar.update(len(scored.records))
            if on_progress is not None:
                seconds = time.monotonic() - started
                left = seconds * (rows_total - rows_done) / rows_done
                on_progress(Progress(len(records), total, seconds, left))
    return records, pictures


def _expected_rows(job: Job, item: Item) -> float:
    """Relative cost of an item: a blend of K adapters takes K times as long as one model."""
    cell = job.cells[item.cell]
    sources = len(cell.active) + (cell.kl_lambda != 1) if cell.method == "mpa" else 1
    return len(item.prompts) * (sources + bool(job.config.path_kl))


def _frame(records: list[Record], job: Job) -> pd.DataFrame:
    """One row per sample with what was asked for spelled out, in plan order whoever scored it first."""
    frame = pd.DataFrame(records).sort_values(["cell", "prompt_index", "seed"], ignore_index=True)
    cells = [job.cells[index] for index in frame["cell"]]
    asked = pd.DataFrame(
        {
            "cell": frame["cell"],
            "method": [cell.method for cell in cells],
            **{f"w_{name}": [cell.weights[index] for cell in cells] for index, name in enumerate(job.basis)},
            "kl_lambda": [cell.kl_lambda for cell in cells],
            "prompt": [job.prompts[index] for index in frame["prompt_index"]],
        }
    )
    return pd.concat([asked, frame.drop(columns="cell")], axis=1)


def _facts(planned: Plan, samples: int) -> Facts:
    job, config, record = planned.job, planned.config, planned.job.bundle.record
    workers = f"{config.num_workers} workers" if config.num_workers > 1 else "one worker"
    hardware = "GPU" if config.gpus_per_worker else f"CPU ({os.cpu_count()} cores, {platform.machine()})"
    return Facts(
        bundle=record.ref,
        bundle_digest=record.digest,
        digest=planned.digest,
        base=f"{record.base.source} (hash {record.base.sha256[:12]})",
        adapters=dict(zip(job.basis, planned.objectives, strict=True)),
        rewards=planned.versions,
        prompts=job.prompts,
        seeds=config.seeds,
        steps=config.num_inference_steps or 0,
        guidance=config.guidance_scale or 0.0,
        eta=config.eta,
        cells=len(job.cells),
        samples=samples,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=f"{workers} on a {hardware}",
        batch_size=config.batch_size,
        resamples=config.resamples,
        confidence=config.confidence,
        path_kl=config.path_kl,
    )
