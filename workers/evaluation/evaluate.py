"""Evaluate a bundle: plan the grid, score it, analyse it, and write tables, figures and the report.

Everything that can be wrong with a run file is found before the first image.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from blend.finetune.config import TrainConfig
from blend.rewards import RewardError, load_reward
from infra.manifests import canonical
from workers.bundles import LoadedBundle
from workers.evaluation.analysis import analyse
from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.dispatch import score_all
from workers.evaluation.files import write_files
from workers.evaluation.grid import Cell, plan_cells
from workers.evaluation.job import Item, Job, OracleAdapter, plan_items, seed_blocks
from workers.evaluation.ledger import Ledger
from workers.evaluation.pictures import Pixels, pictured_cells
from workers.evaluation.report import Facts
from workers.evaluation.retraining import plan_oracles
from workers.evaluation.rivals import is_rival, parse_rival
from workers.evaluation.scoring import company, score_column
from workers.evaluation.verdicts import COLUMNS as VERDICTS
from workers.evaluation.verdicts import JUDGED

MEASURED = ("diversity", "rows", "decodes", "gradients", "path_kl", "seconds", "memory_mb")
# What changes how the work is done, but not its result.
PLACEMENT = {"bundle", "oracle_run", "num_workers", "gpus_per_worker", "reward_actors", "reward_gpus"}
# Columns that are there whatever is evaluated.
COLUMNS = {
    *("cell", "method", "kl_lambda", "prompt", "prompt_index", "seed", "diversity", "rows", "path_kl", "seconds"),
    *("decodes", "gradients", "memory_mb", *VERDICTS),
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
    """A checked evaluation: what will be done, and the digest that names its result.

    `oracle_runs` are the trainings behind the oracles' cells; the job has an adapter for those that were done.
    """

    config: EvaluateConfig
    job: Job
    objectives: tuple[str, ...]
    versions: dict[str, str]
    digest: str
    oracle_runs: dict[Cell, TrainConfig] = field(default_factory=dict)

    def with_oracles(self, oracles: Mapping[Cell, OracleAdapter]) -> Plan:
        """The plan with these oracles' adapters."""
        return replace(self, job=replace(self.job, oracles=dict(oracles)))


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
    cells = _without_gradientless(plan_cells(config, basis), objectives)
    oracle_runs = plan_oracles(config, bundle, cells, objectives)
    versions = {name: _reward_version(name) for name in names}
    identity = {
        "config": config.model_dump(mode="json", exclude=PLACEMENT),
        "bundle": bundle.record.digest,
        "rewards": versions,
        "oracles": sorted(run.name for run in oracle_runs.values()),
        "software": version("diffusion-blend"),
    }
    digest = hashlib.sha256(canonical(identity)).hexdigest()
    scales = _scales(config, bundle, cells)
    job = Job(config, bundle, basis, objectives, scales, tuple(cells), tuple(config.prompts), versions)
    return Plan(config, job, objectives, versions, digest, oracle_runs)


def _without_gradientless(cells: Sequence[Cell], objectives: Sequence[str]) -> list[Cell]:
    """Leave out guidance by rewards that have no gradient; EvaluationError where that is all of it."""
    guided = [cell for cell in cells if is_rival(cell.method) and parse_rival(cell.method).needs_gradients]
    flat = {name for name in objectives if not load_reward(name).differentiable}
    lost = {cell for cell in guided if any(objectives[place] in flat for place in cell.active)}
    if guided and len(lost) == len(guided):
        raise EvaluationError(
            f"rivals: {guided[0].method} needs gradients, and {', '.join(sorted(flat))} has none, which every mix here "
            "has a share of: leave it out, or add a mix of other rewards to oracle_weights",
            "rivals",
        )
    return [cell for cell in cells if cell not in lost]


def _scales(config: EvaluateConfig, bundle: LoadedBundle, cells: Sequence[Cell]) -> tuple[tuple[float, float], ...]:
    """Mean and standard deviation of each adapter's reward under the base, as its training measured them."""
    needed = any(is_rival(cell.method) and parse_rival(cell.method).searches for cell in cells)
    scales = []
    for name, record in bundle.adapter_records.items():
        measured = [record.metrics.get(key) for key in ("base_reward", "base_std")]
        if needed and (measured[0] is None or measured[1] is None):
            raise EvaluationError(
                f"rivals: the manifest of {record.ref} states no base_reward and base_std, by which best_of, code and "
                f"rgg weigh {name} against the others: leave them out of {', '.join(config.rivals)}, or train it again",
                "rivals",
            )
        scales.append(tuple(one.value if one is not None else float("nan") for one in measured))
    return tuple((mean, sd) for mean, sd in scales)


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
    pictures = {place: _pixels(ledger, key) for place, key in pictured.items()}
    analysis = analyse(frame, job.cells, job.basis, planned.objectives, list(job.rewards), planned.config)
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
        if not ledger.has(key, [*needed, *(["png"] if key in pictured else [])], {"company": among})
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
    records = []
    for cell, at, seed, _, key in _grid(job):
        asked, row = job.cells[cell], ledger.get(key) or {}
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
            }
        )
    return pd.DataFrame(records).sort_values(["cell", "prompt_index", "seed"], ignore_index=True)


def _pixels(ledger: Ledger, key: str) -> Pixels:
    """The picture of a sample, uint8 [H, W, 3]."""
    row = ledger.get(key) or {}
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
