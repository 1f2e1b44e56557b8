"""One self-contained HTML file about an evaluation, for people who did not run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from workers.evaluation.analysis import ADAPTERS_ALONE, Analysis
from workers.evaluation.grid import ADAPTER, BASE
from workers.evaluation.labels import (
    EXPLANATIONS,
    cell_label,
    dial_label,
    method_label,
    number,
    percent,
    preference_label,
    span,
)
from workers.evaluation.pictures import Pixels, data_uri, png_uri
from workers.evaluation.plots import blends
from workers.evaluation.style import DPI

Row = dict[str, Any]
CSS_DPI = 96


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


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure in both themes, as PNG."""

    light: bytes
    dark: bytes


def render_report(
    analysis: Analysis,
    facts: Facts,
    charts: Mapping[str, Chart],
    pictures: Mapping[tuple[int, int], Pixels],
    rows: Sequence[int],
) -> str:
    """The report; `pictures` are keyed (cell, prompt), `rows` are the cells of the image grid from the top."""
    environment = Environment(
        loader=PackageLoader("workers.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scales = analysis.scales
    return environment.get_template("report.html.j2").render(
        analysis=analysis,
        facts=facts,
        level=percent(facts.confidence),
        lede=lede(analysis),
        cards=_cards(analysis),
        grid=_grid(analysis, facts, pictures, rows),
        charts={name: _embed(charts[name]) if name in charts else None for name in ("pareto", "shares", "dial")},
        methods=_methods(analysis),
        first_method=_first(analysis),
        results=_results(analysis),
        scales={name: number(scales[name].sd) for name in analysis.axes()},
        reference={
            name: number(scales[name].mean - analysis.reference_sds * scales[name].sd) for name in analysis.axes()
        },
    )


def lede(analysis: Analysis) -> list[str]:
    """What came out, in a few sentences."""
    overall = analysis.overall
    if overall.empty or overall["share"].isna().all():
        return [
            "The adapters do not clearly improve their own rewards over the base model on these prompts, so how much "
            "of their gain a blend keeps cannot be said. More prompts or longer training would help."
        ]
    first = overall.iloc[0]
    sentences = [
        f"{method_label(first['method'])} keeps {percent(first['share'])} of the gains that the adapters make one by "
        f"one ({span_percent(first['share_low'], first['share_high'])}), over "
        f"{_count(first['preferences'], 'mix', 'mixes')}; "
        f"serving one adapter per image at random would keep {percent(first['switch_share'])}."
    ]
    rivals = [_against(row) for row in overall.iloc[1:].to_dict("records")]
    if rivals:
        sentences.append(f"{'; '.join(rivals)}.")
    return sentences


def _against(row: Row) -> str:
    points = abs(row["difference"]) * 100
    if row["difference_low"] <= 0 <= row["difference_high"]:
        return f"{method_label(row['method'])} keeps {percent(row['share'])}, not clearly more or less"
    word = "less" if row["difference"] < 0 else "more"
    bounds = sorted(abs(row[f"difference_{end}"]) * 100 for end in ("low", "high"))
    return (
        f"{method_label(row['method'])} keeps {percent(row['share'])}, "
        f"{points:.1f} points {word} ({bounds[0]:.1f} to {bounds[1]:.1f})"
    )


def span_percent(low: float, high: float) -> str:
    """An interval of shares."""
    return "" if low != low else f"{percent(low).removesuffix(' %')} to {percent(high)}"


def _count(value: int, one: str, many: str) -> str:
    return f"{value} {one if value == 1 else many}"


def _first(analysis: Analysis) -> str:
    return "" if analysis.overall.empty else method_label(analysis.overall.iloc[0]["method"])


def _cards(analysis: Analysis) -> list[Row]:
    cards = []
    for row in analysis.overall.head(2).to_dict("records"):
        if row["share"] == row["share"]:
            name = f"{method_label(row['method'])}: gain kept"
            interval = span_percent(row["share_low"], row["share_high"])
            cards.append({"name": name, "value": percent(row["share"]), "span": f"{interval}, over all mixes"})
    fronts = analysis.fronts.set_index("front")
    for method in list(analysis.overall["method"][:1]) if not analysis.overall.empty else []:
        front = fronts.loc[method]
        cards.append(
            {
                "name": "Reward space reached",
                "value": f"× {front['ratio']:.2f}",
                "span": f"{front['ratio_low']:.2f} to {front['ratio_high']:.2f} times the adapters alone",
            }
        )
    plain = blends(analysis.summary, lambda_one=True)
    base = float(analysis.summary.iloc[0]["rows"])
    costs = plain.groupby("method", sort=False)["rows"].mean() / base
    value = " · ".join(f"{cost:.2g}×" for cost in costs)
    names = " · ".join(method_label(str(method)).split(" (")[0] for method in costs.index)
    if value:
        cards.append({"name": "Cost, a base image being 1×", "value": value, "span": names})
    return cards


def _grid(analysis: Analysis, facts: Facts, pictures: Mapping[tuple[int, int], Pixels], rows: Sequence[int]) -> Row:
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


def _embed(chart: Chart) -> Row:
    width = int.from_bytes(chart.light[16:20], "big")
    return {"light": png_uri(chart.light), "dark": png_uri(chart.dark), "width": round(width * CSS_DPI * 1.1 / DPI)}


def _measured(value: str, interval: str = "", *, sure: bool = False) -> Row:
    return {"value": value, "span": interval, "sure": sure}


def _methods(analysis: Analysis) -> list[Row]:
    fronts = analysis.fronts.set_index("front")
    overall = analysis.overall.set_index("method") if not analysis.overall.empty else analysis.overall
    rows = []
    for front in fronts.index:
        name = str(front)
        cells = _members(analysis, name)
        known = overall.loc[name] if name in overall.index else None
        ratio = fronts.loc[name]
        rows.append(
            {
                "name": method_label(name),
                "share": _share(known),
                "difference": _difference(known),
                "ratio": _measured(f"× {ratio['ratio']:.2f}", span(ratio["ratio_low"], ratio["ratio_high"], 2))
                if name != ADAPTERS_ALONE
                else _measured("× 1"),
                "rows": number(cells["rows"].mean(), 0),
                "seconds": number(cells["seconds"].mean(), 2),
                "about": EXPLANATIONS.get(name, "With λ as a second dial." if ", " in name else ""),
            }
        )
    return rows


def _members(analysis: Analysis, front: str) -> Any:
    summary = analysis.summary
    if front in (BASE, ADAPTERS_ALONE):
        return summary[summary["method"] == (BASE if front == BASE else ADAPTER)]
    method, _, anything = front.partition(", ")
    mine = summary[summary["method"] == method]
    return mine if anything else mine[mine["kl_lambda"] == 1]


def _share(row: Any) -> Row:
    if row is None or row["share"] != row["share"]:
        return _measured("–")
    if row["share_low"] == row["share_high"]:
        return _measured(percent(row["share"]))
    return _measured(percent(row["share"]), span_percent(row["share_low"], row["share_high"]))


def _difference(row: Any) -> Row:
    if row is None or row["difference"] != row["difference"]:
        return _measured("–")
    low, high = row["difference_low"] * 100, row["difference_high"] * 100
    return _measured(f"{_signed(row['difference'] * 100, 1)} points", span(low, high, 1), sure=low > 0 or high < 0)


def _signed(value: float, digits: int) -> str:
    return number(value, digits) if value < 0 else f"+{number(value, digits)}"


def _results(analysis: Analysis) -> list[Row]:
    rows: list[Row] = []
    previous = BASE
    for row in analysis.summary.to_dict("records"):
        rows.append(
            {
                "name": cell_label({**row, "kl_lambda": 1}, analysis.basis),
                "first": row["method"] != previous,
                "kl_lambda": f"{row['kl_lambda']:g}",
                "rewards": [_reward(row, name) for name in analysis.rewards],
                "share": _share(row),
                "diversity": number(row["diversity"]),
                "path_kl": number(row["path_kl"]),
                "rows": number(row["rows"], 0),
                "seconds": number(row["seconds"], 2),
            }
        )
        previous = row["method"]
    return rows


def _reward(row: Row, name: str) -> Row:
    if row["method"] == BASE:
        return {"mean": number(row[name]), "gain": _measured("–")}
    low, high = row[f"{name}_gain_low"], row[f"{name}_gain_high"]
    gain = _measured(_signed(row[f"{name}_gain"], 3), span(low, high), sure=low > 0 or high < 0)
    return {"mean": number(row[name]), "gain": gain}
