"""One self-contained HTML file about an evaluation, for people who did not run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ADAPTER, BASE
from workers.evaluation.labels import cell_label, dial_label, method_label, number, percent, preference_label
from workers.evaluation.pictures import Pixels, data_uri
from workers.evaluation.report_alts import alts
from workers.evaluation.report_comparison import regions
from workers.evaluation.report_pages import Chart, embed, environment
from workers.evaluation.report_tables import methods_table, results_table, rivals_table
from workers.evaluation.report_words import cards, lede

FIGURES = ("pareto", "shares", "dial", "retraining", "dial_retraining", "cost", "reward_kl")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was evaluated, as the report states it."""

    bundle: str
    bundle_digest: str
    digest: str
    base: str
    adapters: dict[str, str]  # basis name -> reward
    rewards: dict[str, str]  # reward -> version
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    eta: float
    cells: int
    samples: int
    date: str
    machine: str
    batch_size: int
    resamples: int
    confidence: float
    path_kl: bool


def render_report(
    analysis: Analysis,
    facts: Facts,
    charts: Mapping[str, Chart],
    pictures: Mapping[tuple[int, int], Pixels],
    rows: Sequence[int],
    comparison: Mapping[str, Any] | None = None,
) -> str:
    """The report; `pictures` are keyed (cell, prompt), `rows` are the cells of the image grid from the top.

    `comparison` is what infra.comparing finds; report_comparison.insert puts one into a report that has none yet.
    """
    scales, level = analysis.scales, percent(facts.confidence)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            analysis=analysis,
            facts=facts,
            level=level,
            lede=lede(analysis),
            cards=cards(analysis),
            grid=_grid(analysis, facts, pictures, rows),
            charts={name: embed(charts[name]) if name in charts else None for name in FIGURES},
            alts=alts(analysis, charts),
            rivals=rivals_table(analysis),
            methods=methods_table(analysis),
            results=results_table(analysis),
            compared=regions(comparison, level),
            scales={name: number(scales[name].sd) for name in analysis.axes()},
            reference={
                name: number(scales[name].mean - analysis.reference_sds * scales[name].sd) for name in analysis.axes()
            },
        )
    )


def _grid(
    analysis: Analysis, facts: Facts, pictures: Mapping[tuple[int, int], Pixels], rows: Sequence[int]
) -> dict[str, Any]:
    records = analysis.summary.to_dict("records")
    prompts = sorted({prompt for _, prompt in pictures})
    shown = []
    for cell in rows:
        row = records[cell]
        name = method_label(row["method"]) if row["method"] != ADAPTER else preference_label(row, analysis.basis)
        detail = "" if row["method"] in (BASE, ADAPTER) else preference_label(row, analysis.basis)
        label = cell_label(row, analysis.basis)
        shown.append(
            {
                "name": name,
                "detail": " · ".join(part for part in (detail, dial_label(row)) if part),
                "pictures": [
                    {"uri": data_uri(pictures[cell, prompt]), "alt": f"{facts.prompts[prompt]} {label}"}
                    for prompt in prompts
                ],
            }
        )
    return {"prompts": [facts.prompts[prompt] for prompt in prompts], "rows": shown}
