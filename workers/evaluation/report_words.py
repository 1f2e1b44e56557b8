"""What a report says in words: the findings in a few sentences, and the figures to take away."""

from __future__ import annotations

from typing import Any

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ORACLE
from workers.evaluation.labels import method_label, percent
from workers.evaluation.plots import BLENDS, mixes

Row = dict[str, Any]


def lede(analysis: Analysis) -> list[str]:
    """What came out, in a few sentences."""
    overall = analysis.overall
    if overall.empty or overall["share"].isna().all():
        return [
            "The adapters do not clearly improve their own rewards over the base model on these prompts, so how much "
            "of their gain a blend keeps cannot be said. More prompts or longer training would help.",
            *_beside_retraining(analysis),
            *_failures(analysis),
        ]
    first = overall.iloc[0]
    sentences = [
        f"{method_label(first['method'])} keeps {percent(first['share'])} of the gains that the adapters make one by "
        f"one ({span_percent(first['share_low'], first['share_high'])}), over "
        f"{count(first['preferences'], 'mix', 'mixes')}; "
        f"serving one adapter per image at random would keep {percent(first['switch_share'])}.",
        *_beside_retraining(analysis),
    ]
    others = overall.iloc[1:].dropna(subset=["share"])
    # rivals and oracles have a measure and a table of their own
    others = others if analysis.rivals.empty else others[others["method"].isin(BLENDS)]
    rivals = [_against(row, first["preferences"]) for row in others.to_dict("records")]
    if rivals:
        sentences.append(f"{'; '.join(rivals)}.")
    return [*sentences, *_failures(analysis)]


def _failures(analysis: Analysis) -> list[str]:
    """Which rivals made images that are none, and how often."""
    failing = analysis.summary[analysis.summary["failed"] > 0]
    told = [
        f"{method_label(str(method))} in {rows['failed'].sum()} of {rows['samples'].sum()}"
        for method, rows in failing.groupby("method", sort=False)
    ]
    if not told:
        return []
    return [f"Not every attempt ended in an image: {'; '.join(told)} failed. Each counts as the worst one there is."]


def _beside_retraining(analysis: Analysis) -> list[str]:
    """How near the first method comes to models retrained for each mix, and the best of the rivals."""
    table = analysis.rivals.dropna(subset=["share_of_oracle"])
    blends, rivals = (table[table["method"].isin(BLENDS) == wanted] for wanted in (True, False))
    rivals = rivals[rivals["method"] != ORACLE]
    if blends.empty:
        return []
    first = blends.iloc[0]
    reach = span_percent(first["share_of_oracle_low"], first["share_of_oracle_high"])
    sentence = (
        f"Without retraining, {method_label(first['method'])} reaches {percent(first['share_of_oracle'])} ({reach}) of "
        f"what models retrained for {count(first['preferences'], 'mix', 'mixes')} gain."
    )
    if not rivals.empty:
        best = rivals.loc[rivals["share_of_oracle"].idxmax()]
        sentence += (
            f" The best of the other approaches, {method_label(best['method'])}, reaches "
            f"{percent(best['share_of_oracle'])} at {best['rows'] / float(analysis.summary.iloc[0]['rows']):.2g} times "
            "the cost of a base image."
        )
    return [sentence]


def _against(row: Row, preferences: int) -> str:
    """A method beside the first, which was measured at so many preferences; the difference is over those of both."""
    kept, alike = f"{method_label(row['method'])} keeps {percent(row['share'])}", ""
    if row["preferences"] != preferences:
        kept, alike = f"{kept} over its {count(row['preferences'], 'mix', 'mixes')}", " on the mixes of both"
    if row["difference"] != row["difference"]:
        return kept
    if row["difference_low"] <= 0 <= row["difference_high"]:
        return f"{kept}, not clearly more or less{alike}"
    word = "less" if row["difference"] < 0 else "more"
    low, high = sorted(abs(row[f"difference_{end}"]) * 100 for end in ("low", "high"))
    return f"{kept}, {abs(row['difference']) * 100:.1f} points {word}{alike} ({low:.1f} to {high:.1f})"


def span_percent(low: float, high: float) -> str:
    """An interval of shares."""
    return "" if low != low else f"{percent(low).removesuffix(' %')} to {percent(high)}"


def count(value: int, one: str, many: str) -> str:
    """A number of things."""
    return f"{value} {one if value == 1 else many}"


def cards(analysis: Analysis) -> list[Row]:
    """The figures that a reader should take away, each with its interval."""
    return [*_retraining_card(analysis), *_share_cards(analysis), *_space_card(analysis), *_cost_card(analysis)]


def _retraining_card(analysis: Analysis) -> list[Row]:
    table = analysis.rivals[analysis.rivals["method"].isin(BLENDS)].dropna(subset=["share_of_oracle"])
    if table.empty:
        return []
    row = table.iloc[0]
    interval = span_percent(row["share_of_oracle_low"], row["share_of_oracle_high"])
    name = f"{method_label(row['method'])}: of a retrained model's gain"
    return [{"name": name, "value": percent(row["share_of_oracle"]), "span": f"{interval}, without retraining"}]


def _share_cards(analysis: Analysis) -> list[Row]:
    if analysis.overall.empty:
        return []
    table = analysis.overall[analysis.overall["method"].isin(BLENDS)].dropna(subset=["share"])
    return [
        {
            "name": f"{method_label(row['method'])}: gain kept",
            "value": percent(row["share"]),
            "span": f"{span_percent(row['share_low'], row['share_high'])}, over all mixes",
        }
        for row in table.head(2 if analysis.rivals.empty else 1).to_dict("records")
    ]


def _space_card(analysis: Analysis) -> list[Row]:
    fronts = analysis.fronts[analysis.fronts["front"].isin(BLENDS)].dropna(subset=["ratio"])
    if fronts.empty:
        return []
    front = fronts.iloc[0]
    interval = f"{front['ratio_low']:.2f} to {front['ratio_high']:.2f} times the adapters alone"
    return [{"name": "Reward space reached", "value": f"× {front['ratio']:.2f}", "span": interval}]


def _cost_card(analysis: Analysis) -> list[Row]:
    table = mixes(analysis)
    costs = table[table["method"].isin(BLENDS)].groupby("method", sort=False)["rows"].mean()
    if costs.empty:
        return []
    multiples = costs / float(analysis.summary.iloc[0]["rows"])
    first, cheapest = str(costs.index[0]), str(costs.idxmin())
    detail = "a base image being 1×"
    if cheapest != first:
        detail += f"; {method_label(cheapest)}: {multiples[cheapest]:.2g}×"
    return [{"name": f"{method_label(first)}: cost per image", "value": f"{multiples[first]:.2g}×", "span": detail}]
