"""Evaluate a bundle: score what was planned, analyse it, and write tables, figures and the report."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from blend.plans import plan_rows
from workers.evaluation.analysis import analyse
from workers.evaluation.config import EvaluationError
from workers.evaluation.dispatch import score_all
from workers.evaluation.failures import count_failures
from workers.evaluation.files import write_files
from workers.evaluation.job import Item, Job, plan_items, seed_blocks
from workers.evaluation.ledger import Ledger
from workers.evaluation.pictures import Pixels, pictured_cells
from workers.evaluation.planning import Plan
from workers.evaluation.report import Facts
from workers.evaluation.scoring import company, score_column
from workers.evaluation.verdicts import COLUMNS as VERDICTS
from workers.evaluation.verdicts import JUDGED

MEASURED = ("diversity", "rows", "decodes", "gradients", "path_kl", "seconds", "memory_mb")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the scoring is; seconds_left is None before the first result."""

    done: int
    total: int
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Samples, one row each; the summary, one row per cell; and the files in the order of writing."""

    frame: pd.DataFrame
    summary: pd.DataFrame
    files: list[Path]
    facts: Facts


def evaluate(
    planned: Plan,
    output_dir: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    ledger: Ledger | None = None,
) -> EvaluationResult:
    """Do what was planned and write its files into output_dir; a bar on the terminal shows time left.

    ledger: what was scored before, and where the rest goes as it is scored; None forgets at the end.
    Raises EvaluationError when generation or a reward fails.
    """
    job = planned.job
    if untrained := [run.name for cell, run in planned.oracle_runs.items() if cell not in job.oracles]:
        raise EvaluationError(f"oracle_weights: {untrained[0]} is not trained yet: train the oracles first")
    ledger = Ledger() if ledger is None else ledger
    rows = pictured_cells(job.cells)
    shown = range(min(job.config.picture_prompts, len(job.prompts)))
    pictured = {(cell, at): job.key(cell, job.prompts[at], job.config.seeds[0]) for cell in rows for at in shown}
    try:
        _score(job, ledger, set(pictured.values()), on_progress)
    finally:
        ledger.flush()
    frame = _frame(job, ledger)
    first = company(next(seed_blocks(job.config.seeds)))
    pictures = {place: _pixels(ledger, key, first) for place, key in pictured.items()}
    known = {name: sd for name, (_, sd) in zip(job.objectives, job.scales, strict=True) if sd > 0}
    analysis = analyse(frame, job.cells, job.basis, job.objectives, list(job.rewards), planned.config, known)
    facts = _facts(planned, len(frame))
    files = write_files(Path(output_dir), planned.config, facts, frame, analysis, pictures, rows)
    return EvaluationResult(frame, analysis.summary, files, facts)


def _grid(job: Job) -> Iterator[tuple[int, int, int, str, str]]:
    """Every sample of the plan: cell, prompt, seed, company and key."""
    for cell in range(len(job.cells)):
        for at, prompt in enumerate(job.prompts):
            for block in seed_blocks(job.config.seeds):
                for seed in block:
                    yield cell, at, seed, company(block), job.key(cell, prompt, seed)


def _missing(job: Job, ledger: Ledger, pictured: set[str]) -> set[str]:
    """Keys that the ledger lacks, or knows less of than is asked."""
    needed = [score_column(job, name) for name in job.rewards]
    needed += ["rows", *([JUDGED] if job.config.judge else [])]
    return {
        key
        for _, _, _, among, key in _grid(job)
        if not ledger.has(key, among, [*needed, *(["png"] if key in pictured else [])])
    }


def _score(job: Job, ledger: Ledger, pictured: set[str], on_progress: Callable[[Progress], None] | None) -> None:
    missing = _missing(job, ledger, pictured)
    items = plan_items(job, missing, pictured)
    total = sum(len(item.prompts) * len(item.seeds) for item in items)
    started, rows_done, done = time.monotonic(), 0.0, 0
    rows_total = sum(_expected_rows(job, item) for item in items)
    with tqdm(total=total, desc="evaluate", unit="image", disable=None) as bar:
        for scored in score_all(job, items):
            ledger.add(scored.rows)
            rows_done += _expected_rows(job, scored.item)
            done += len(scored.rows)
            bar.update(len(scored.rows))
            if on_progress is not None:
                seconds = time.monotonic() - started
                left = seconds * (rows_total - rows_done) / rows_done
                on_progress(Progress(done, total, seconds, left))


def _expected_rows(job: Job, item: Item) -> float:
    """Relative cost of an item: a blend of K adapters takes K times as long as one model."""
    cell, rival = job.cells[item.cell], job.rival(item.cell)
    sources: float = len(cell.active) + (cell.kl_lambda != 1) if cell.method == "mpa" else 1
    if rival is not None:
        sources = rival.forecast(int(job.config.num_inference_steps or 1))
    return len(item.prompts) * len(item.seeds) * (sources + bool(job.config.path_kl))


def _frame(job: Job, ledger: Ledger) -> pd.DataFrame:
    """One row per sample with what was asked for spelled out, in plan order whoever scored it first."""
    measured = [*MEASURED, *(VERDICTS if job.config.judge else ())]
    surplus = [_measuring_rows(job, cell) for cell in range(len(job.cells))]
    records = []
    for cell, at, seed, among, key in _grid(job):
        asked, row = job.cells[cell], ledger.get(key, among) or {}
        records.append(
            {
                "cell": cell,
                "method": asked.method,
                **{f"w_{name}": weight for name, weight in zip(job.basis, asked.weights, strict=True)},
                "kl_lambda": asked.kl_lambda,
                "prompt": job.prompts[at],
                "prompt_index": at,
                "seed": seed,
                **{name: row[score_column(job, name)] for name in job.rewards},
                **{name: row.get(name, np.nan) for name in measured},
                "rows": row["rows"] - surplus[cell],
                # parts from before failures were noted hold none
                "failed": int(row.get("failed", 0)),
            }
        )
    frame = pd.DataFrame(records).sort_values(["cell", "prompt_index", "seed"], ignore_index=True)
    return count_failures(frame, list(job.rewards))


def _measuring_rows(job: Job, cell: int) -> int:
    """Rows of an image that only its path KL needs: no cost of the method."""
    sample = job.sample(cell, "", 0)
    names = [*job.basis, *(oracle.name for oracle in job.oracles.values())]
    steps = sample.num_inference_steps
    if not sample.measure_kl:
        return 0
    spent, needed = (plan_rows(sample, names, steps, measured=measured).rows_until(steps) for measured in (True, False))
    return spent - needed


def _pixels(ledger: Ledger, key: str, among: str) -> Pixels:
    """The picture of a sample, uint8 [H, W, 3]."""
    row = ledger.get(key, among) or {}
    return np.asarray(Image.open(io.BytesIO(row["png"])))


def _facts(planned: Plan, samples: int) -> Facts:
    job, config, record = planned.job, planned.config, planned.job.bundle.record
    workers = f"{config.num_workers} workers" if config.num_workers > 1 else "one worker"
    hardware = "GPU" if config.gpus_per_worker else f"CPU ({os.cpu_count()} cores, {platform.machine()})"
    return Facts(
        bundle=record.ref,
        bundle_digest=record.digest,
        digest=planned.digest,
        base=f"{record.base.source} (hash {record.base.sha256[:12]})",
        adapters=dict(zip(job.basis, job.objectives, strict=True)),
        rewards=job.rewards,
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
