"""The files of a finished evaluation, written into one directory; `summary.json` comes last and marks it complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from workers.evaluation.analysis import Analysis
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.labels import cell_label, percent
from workers.evaluation.pictures import Pixels, grid_png
from workers.evaluation.plots import dial_png, shares_png
from workers.evaluation.plots_cost import cost_png, reward_kl_png
from workers.evaluation.plots_pareto import pareto_png
from workers.evaluation.plots_retraining import dial_retraining_png, retraining_png
from workers.evaluation.report import Facts, render_report
from workers.evaluation.report_comparison import insert
from workers.evaluation.report_pages import Chart
from workers.evaluation.report_words import lede
from workers.evaluation.style import DARK, LIGHT

COMMIT = "summary.json"
REPORT = "report.html"
SAMPLES = "samples.parquet"
SUMMARY_TABLE = "summary.parquet"
SCHEMA_VERSION = 1
FIGURES = {
    "pareto": pareto_png,
    "shares": shares_png,
    "dial": dial_png,
    "retraining": retraining_png,
    "dial_retraining": dial_retraining_png,
    "cost": cost_png,
    "reward_kl": reward_kl_png,
}
NAMES = (SAMPLES, SUMMARY_TABLE, "summary.csv", *(f"{name}.png" for name in FIGURES), "grid.png", REPORT, COMMIT)


def write_files(
    directory: Path,
    config: EvaluateConfig,
    facts: Facts,
    frame: pd.DataFrame,
    analysis: Analysis,
    pictures: Mapping[tuple[int, int], Pixels],
    rows: Sequence[int],
    comparison: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Tables, figures, image grid, report and summary; returns their paths in the order of writing.

    `comparison` with an earlier evaluation, if it is known by now, stands in the report; else see `tell_comparison`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (directory / name).unlink(missing_ok=True)
    charts = _charts(analysis)
    records = analysis.summary.to_dict("records")
    labels = {cell: cell_label(records[cell], analysis.basis) for cell in rows}
    shown = {prompt: facts.prompts[prompt] for prompt in sorted({prompt for _, prompt in pictures})}
    frame.to_parquet(directory / SAMPLES, index=False)
    analysis.summary.to_parquet(directory / SUMMARY_TABLE, index=False)
    analysis.summary.to_csv(directory / "summary.csv", index=False)
    for name, chart in charts.items():
        (directory / f"{name}.png").write_bytes(chart.light)
    (directory / "grid.png").write_bytes(grid_png(pictures, labels, shown))
    report = render_report(analysis, facts, charts, pictures, rows, comparison)
    (directory / REPORT).write_text(report, encoding="utf-8")
    summary = json.dumps(_summary(config, facts, analysis), indent=1, ensure_ascii=False)
    (directory / COMMIT).write_text(summary + "\n", encoding="utf-8")
    return files_in(directory)


def tell_comparison(directory: Path, comparison: Mapping[str, Any]) -> None:
    """Put the comparison with an earlier evaluation into the report of a finished one, in the place of any other.

    A report from before there were comparisons is left as it is.
    """
    if not (directory / REPORT).is_file():
        return
    facts = json.loads((directory / COMMIT).read_text(encoding="utf-8"))["facts"]
    page = (directory / REPORT).read_text(encoding="utf-8")
    (directory / REPORT).write_text(insert(page, comparison, percent(facts["confidence"])), encoding="utf-8")


def files_in(directory: Path) -> list[Path]:
    """The evaluation's files in a directory, which may hold other things too; the one that commits it comes last."""
    return [directory / name for name in NAMES if (directory / name).is_file()]


def _charts(analysis: Analysis) -> dict[str, Chart]:
    charts = {}
    for name, draw in FIGURES.items():
        light, dark = draw(analysis, LIGHT), draw(analysis, DARK)
        if light is not None and dark is not None:
            charts[name] = Chart(light, dark)
    return charts


def _summary(config: EvaluateConfig, facts: Facts, analysis: Analysis) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "facts": asdict(facts),
        "config": config.model_dump(mode="json"),
        "headline": lede(analysis),
        "scales": {name: asdict(scale) for name, scale in analysis.scales.items()},
        "reference_point": {
            name: analysis.scales[name].mean - analysis.reference_sds * analysis.scales[name].sd
            for name in analysis.axes()
        },
        "cells": _records(analysis.summary),
        "methods": _records(analysis.overall),
        "hypervolumes": _records(analysis.fronts),
        "oracles": _records(analysis.oracles),
        "rivals": _records(analysis.rivals),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with null for what is undefined: JSON has no NaN."""
    return [
        {key: None if value != value else value for key, value in row.items()}
        for row in json.loads(table.to_json(orient="records", double_precision=15))
    ]
