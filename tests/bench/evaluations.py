"""Evaluations as parts of a benchmark: made once, gone on with where they stopped, and quoted by their intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.evaluation import EvaluateConfig, evaluate
from workers.evaluation.storing import is_complete, open_ledger, prepare, ready, run_directory

Span = dict[str, float]


def sized(config: EvaluateConfig, prompts: int, seeds: int) -> EvaluateConfig:
    """The same evaluation of the first so many prompts, with seeds from 0."""
    return config.model_copy(update={"num_prompts": prompts, "seeds": tuple(range(seeds))})


def run(config: EvaluateConfig) -> Path:
    """The directory of the finished evaluation."""
    planned = ready(prepare(config))
    directory = run_directory(planned)
    if not is_complete(planned, directory):
        evaluate(planned, directory, ledger=open_ledger(planned, None))
    print(f"{len(planned.job.cells)} settings in {directory}")
    return directory


def span(row: Mapping[str, Any], name: str) -> Span:
    """A column of a table with its interval, as result files hold it."""
    return {"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
