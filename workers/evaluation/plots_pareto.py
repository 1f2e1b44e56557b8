"""The figure of what is traded for what: gains in pairs of rewards."""

from __future__ import annotations

from itertools import combinations

import pandas as pd
from matplotlib.axes import Axes

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ADAPTER, BASE, ORACLE, equal_weights
from workers.evaluation.labels import method_label, preference_label
from workers.evaluation.placing import Label, Point, along, place, point_label, settle
from workers.evaluation.plots import BLENDS, mixes, sweeps
from workers.evaluation.style import LIGHT, Theme, legend, marker, panels, png, quiet

PANEL = 3.6, 3.4


def pareto_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Gains over the base with paired intervals, one panel for each pair of rewards; None for one reward.

    The base is the origin: what all cells share (hard and easy prompts) is gone from the intervals.
    """
    pairs = list(combinations(range(len(analysis.axes())), 2))
    if not pairs:
        return None
    figure, found = panels(theme, len(pairs), *PANEL)
    names = [_panel(axes, analysis, pair, theme) for axes, pair in zip(found, pairs, strict=True)]
    legend(figure, theme)
    settle(figure)
    for axes, (labels, others) in zip(found, names, strict=True):
        place(axes, labels, theme, others=others)
    return png(figure)


def _panel(axes: Axes, analysis: Analysis, pair: tuple[int, int], theme: Theme) -> tuple[list[Label], list[Point]]:
    """Draws one pair of rewards; returns what is to be named, and the points that names must not cover."""
    names = analysis.axes()
    columns = tuple(f"{names[index]}_gain" for index in pair)
    within = _within(analysis, pair)
    ends = [f"w_{analysis.basis[index]}" for index in _ends(analysis, pair)]
    table = mixes(analysis)
    table = table[(table[ends] > 0).all(axis=1)]
    lines: list[Point] = []
    for method in dict.fromkeys(table["method"]):
        if method in BLENDS:
            lines += _curve(axes, analysis, within, columns, method, pair, theme)
        _crosses(axes, table[table["method"] == method], columns, method, within, theme)
    oracles = analysis.summary[(analysis.summary["method"] == ORACLE) & (analysis.summary["kl_lambda"] == 1)]
    oracles = oracles[(oracles[ends] > 0).all(axis=1)]
    if not oracles.empty:
        _crosses(axes, oracles, columns, ORACLE, within, theme)
    labels = [*_dial_path(axes, analysis, columns, theme), *_anchors(axes, analysis, columns, theme)]
    axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=1)
    axes.axvline(0, color=theme.muted, linewidth=0.9, zorder=1)
    axes.set_xlabel(f"{names[pair[0]]}, gain  →")
    axes.set_ylabel(f"{names[pair[1]]}, gain  →")
    axes.margins(0.16)
    quiet(axes, theme)
    points = pd.concat([table, oracles])
    return labels, [*lines, *zip(points[columns[0]], points[columns[1]], strict=True)]


def _ends(analysis: Analysis, pair: tuple[int, int]) -> list[int]:
    """The adapters that were tuned for one of the two rewards."""
    both = [analysis.axes()[index] for index in pair]
    return [index for index, objective in enumerate(analysis.objectives) if objective in both]


def _within(analysis: Analysis, pair: tuple[int, int]) -> pd.DataFrame:
    """Cells that use no other adapters than the pair's."""
    ends = _ends(analysis, pair)
    others = [f"w_{name}" for index, name in enumerate(analysis.basis) if index not in ends]
    return analysis.summary[(analysis.summary[others] == 0).all(axis=1)] if others else analysis.summary


def _curve(
    axes: Axes,
    analysis: Analysis,
    within: pd.DataFrame,
    columns: tuple[str, ...],
    method: str,
    pair: tuple[int, int],
    theme: Theme,
) -> list[Point]:
    """The method's mixes of the pair, from one adapter alone to the other; returns the points of the line."""
    line = within[(within["method"] == method) & (within["kl_lambda"] == 1)]
    if line.empty:
        return []
    line = pd.concat([line, within[within["method"] == ADAPTER]])
    line = line.sort_values(f"w_{analysis.basis[_ends(analysis, pair)[0]]}", ascending=False)
    x, y = (line[name] for name in columns)
    axes.plot(x, y, color=theme.colour(method), linewidth=1.4, alpha=0.75, zorder=2)
    return along(list(zip(x, y, strict=True)))


def _crosses(
    axes: Axes, table: pd.DataFrame, columns: tuple[str, ...], method: str, within: pd.DataFrame, theme: Theme
) -> None:
    """Means with intervals in both rewards; mixes with adapters outside the pair are hollow and have none."""
    colour = theme.colour(method)
    inside = table["cell"].isin(within["cell"])
    _bars(axes, table[inside], columns, colour, theme)
    x, y = (table[name] for name in columns)
    size = 90 if method == ORACLE else 34
    axes.scatter(
        x[inside],
        y[inside],
        s=size,
        marker=marker(method),
        color=colour,
        edgecolor=theme.background,
        linewidth=0.8,
        zorder=4,
        label=method_label(method),
    )
    axes.scatter(
        x[~inside],
        y[~inside],
        s=size * 0.7,
        marker=marker(method),
        facecolor="none",
        edgecolor=colour,
        alpha=0.8,
        zorder=3,
    )


def _bars(axes: Axes, table: pd.DataFrame, columns: tuple[str, ...], colour: str, theme: Theme) -> None:
    x, y = columns
    axes.hlines(table[y], table[f"{x}_low"], table[f"{x}_high"], color=colour, linewidth=1, alpha=0.45, zorder=2)
    axes.vlines(table[x], table[f"{y}_low"], table[f"{y}_high"], color=colour, linewidth=1, alpha=0.45, zorder=2)


def _anchors(axes: Axes, analysis: Analysis, columns: tuple[str, ...], theme: Theme) -> list[Label]:
    """The base and each adapter alone, to be named where they stand."""
    table = analysis.summary[analysis.summary["method"].isin([BASE, ADAPTER])]
    _bars(axes, table, columns, theme.ink, theme)
    labels = []
    for row in table.to_dict("records"):
        base = row["method"] == BASE
        point = row[columns[0]], row[columns[1]]
        axes.scatter(*point, s=42, marker="o" if base else "D", color=theme.ink, zorder=5)
        text = "base" if base else preference_label(row, analysis.basis).removesuffix(" alone")
        labels.append(point_label(text, *point, theme.ink, bold=True))
    return labels


def _dial_path(axes: Axes, analysis: Analysis, columns: tuple[str, ...], theme: Theme) -> list[Label]:
    """The equal-weights blend as lambda grows, from the base outwards; its strengths are to be named."""
    equal = sweeps(analysis).get(_equal_label(analysis))
    if equal is None:
        return []
    x, y = columns
    style = {"color": theme.muted, "linewidth": 1.1, "linestyle": (0, (1, 2)), "zorder": 1}
    axes.plot(equal[x], equal[y], label="λ dial, equal weights", **style)
    steps = equal[~equal["kl_lambda"].isin([0, 1])]
    axes.scatter(steps[x], steps[y], s=9, color=theme.muted, zorder=2)
    return [point_label(f"λ {row['kl_lambda']:g}", row[x], row[y], theme.muted) for row in steps.to_dict("records")]


def _equal_label(analysis: Analysis) -> str:
    weights = equal_weights(len(analysis.basis))
    row = {f"w_{name}": weight for name, weight in zip(analysis.basis, weights, strict=True)}
    return preference_label(row, analysis.basis)
