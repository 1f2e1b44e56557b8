"""The figures of an evaluation, drawn from its summary: trade-offs, shares of the gain, the lambda dial."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ADAPTER, BASE, equal_weights
from workers.evaluation.labels import method_label, preference_label
from workers.evaluation.style import LIGHT, Theme, marker, new_figure, png, quiet

PANEL = 3.9
COLUMNS = 3


def pareto_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Gains over the base with paired intervals, one panel for each pair of rewards; None for one reward.

    The base is the origin: what all cells share (hard and easy prompts) is gone from the intervals.
    """
    pairs = list(combinations(range(len(analysis.axes())), 2))
    if not pairs:
        return None
    figure, panels = _panels(theme, len(pairs), PANEL, 3.5)
    for axes, pair in zip(panels, pairs, strict=True):
        _pareto_panel(axes, analysis, pair, theme)
    handles, labels = panels[0].get_legend_handles_labels()
    _legend(figure, handles, labels, theme)
    return png(figure)


def shares_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Share of the adapters' own gain kept by each method at each preference; None where undefined."""
    table = blends(analysis.summary, lambda_one=True).dropna(subset=["share"])
    if table.empty:
        return None
    labels = [preference_label(row, analysis.basis) for row in table.to_dict("records")]
    order = list(dict.fromkeys(labels))
    methods = list(dict.fromkeys(table["method"]))
    figure = new_figure(theme, 7.6, 1.0 + 0.46 * len(order))
    axes = figure.subplots()
    for rank, method in enumerate(methods):
        mine = table[table["method"] == method]
        at = [order.index(label) for label, same in zip(labels, table["method"] == method, strict=True) if same]
        y = np.array(at) + (rank - (len(methods) - 1) / 2) * 0.22
        _dots(axes, mine, y, method, theme)
    once = table.drop_duplicates(subset=[f"w_{name}" for name in analysis.basis])
    axes.scatter(
        once["switch_share"],
        range(len(once)),
        s=150,
        marker="|",
        color=theme.muted,
        zorder=2,
        label="one adapter per image, drawn by the weights",
    )
    for value, style in ((0.0, "-"), (1.0, (0, (4, 3)))):
        axes.axvline(value, color=theme.muted, linewidth=1, linestyle=style, zorder=1)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
    axes.set_xlabel("share of the gain that each adapter alone makes in its own reward")
    quiet(axes, theme, grid="x")
    axes.tick_params(axis="y", labelcolor=theme.ink)
    _legend(figure, *axes.get_legend_handles_labels(), theme)
    return png(figure)


def dial_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Gain in each reward as the KL dial turns from the base past the tuned model; None without a sweep."""
    sweeps = _sweeps(analysis)
    if not sweeps:
        return None
    figure, panels = _panels(theme, len(sweeps), 3.4, 2.9, share_y=True)
    for axes, (label, table) in zip(panels, sweeps.items(), strict=True):
        _dial_panel(axes, analysis, table, theme)
        axes.set_title(label, color=theme.ink, fontsize=10, loc="left")
        axes.set_xlabel("λ  (0 base, 1 tuned)")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("gain over the base\nin base standard deviations")
    _legend(figure, *panels[0].get_legend_handles_labels(), theme)
    return png(figure)


def blends(summary: pd.DataFrame, *, lambda_one: bool) -> pd.DataFrame:
    """Rows that mix adapters (at lambda 1 only, if asked)."""
    table = summary[~summary["method"].isin([BASE, ADAPTER])]
    return table[table["kl_lambda"] == 1] if lambda_one else table


def _panels(
    theme: Theme, count: int, width: float, height: float, *, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(theme, max(5.2, width * columns), height * rows + 0.45)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    panels = [axes for row in grid for axes in row]
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _legend(figure: Figure, handles: list, labels: list[str], theme: Theme) -> None:
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(len(labels), max(2, int(figure.get_figwidth() / 2.1))),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
        handletextpad=0.4,
        columnspacing=1.6,
    )


def _pareto_panel(axes: Axes, analysis: Analysis, pair: tuple[int, int], theme: Theme) -> None:
    names = analysis.axes()
    x, y = (f"{names[index]}_gain" for index in pair)
    summary = analysis.summary
    weights = [f"w_{name}" for name in analysis.basis]
    ends = [
        index for index, objective in enumerate(analysis.objectives) if objective in (names[pair[0]], names[pair[1]])
    ]
    others = [weights[index] for index in range(len(weights)) if index not in ends]
    within = summary[(summary[others] == 0).all(axis=1)] if others else summary
    mixes = blends(summary, lambda_one=True)
    for method in dict.fromkeys(mixes["method"]):
        line = within[(within["method"] == method) & (within["kl_lambda"] == 1)]
        line = pd.concat([line, within[within["method"] == ADAPTER]])
        line = line.sort_values(weights[ends[0]], ascending=False)
        axes.plot(line[x], line[y], color=theme.colour(method), linewidth=1.4, alpha=0.75, zorder=2)
        both = (mixes[[weights[end] for end in ends]] > 0).all(axis=1)
        _crosses(axes, mixes[(mixes["method"] == method) & both], (x, y), method, within, theme)
    _dial_path(axes, analysis, (x, y), theme)
    _anchors(axes, analysis, (x, y), theme)
    axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=1)
    axes.axvline(0, color=theme.muted, linewidth=0.9, zorder=1)
    axes.set_xlabel(f"{names[pair[0]]}, gain  →")
    axes.set_ylabel(f"{names[pair[1]]}, gain  →")
    axes.margins(0.14)
    quiet(axes, theme)


def _crosses(
    axes: Axes, table: pd.DataFrame, names: tuple[str, str], method: str, within: pd.DataFrame, theme: Theme
) -> None:
    """Means with intervals in both rewards; mixes with adapters outside the pair are hollow."""
    colour = theme.colour(method)
    inside = table["cell"].isin(within["cell"])
    _bars(axes, table[inside], names, colour, theme)
    axes.scatter(
        table.loc[inside, names[0]],
        table.loc[inside, names[1]],
        s=34,
        marker=marker(method),
        color=colour,
        edgecolor=theme.background,
        linewidth=0.8,
        zorder=4,
        label=method_label(method),
    )
    axes.scatter(
        table.loc[~inside, names[0]],
        table.loc[~inside, names[1]],
        s=24,
        marker=marker(method),
        facecolor="none",
        edgecolor=colour,
        alpha=0.8,
        zorder=3,
    )


def _bars(axes: Axes, table: pd.DataFrame, names: tuple[str, str], colour: str, theme: Theme) -> None:
    x, y = names
    axes.hlines(table[y], table[f"{x}_low"], table[f"{x}_high"], color=colour, linewidth=1, alpha=0.45, zorder=2)
    axes.vlines(table[x], table[f"{y}_low"], table[f"{y}_high"], color=colour, linewidth=1, alpha=0.45, zorder=2)


def _anchors(axes: Axes, analysis: Analysis, names: tuple[str, str], theme: Theme) -> None:
    """The base and each adapter alone, named where they stand."""
    table = analysis.summary[analysis.summary["method"].isin([BASE, ADAPTER])]
    _bars(axes, table, names, theme.ink, theme)
    spans = [(float(analysis.summary[name].min()), float(analysis.summary[name].max())) for name in names]
    for row in table.to_dict("records"):
        base = row["method"] == BASE
        point = row[names[0]], row[names[1]]
        axes.scatter(*point, s=42, marker="o" if base else "D", color=theme.ink, zorder=5)
        label = "base" if base else preference_label(row, analysis.basis).removesuffix(" alone")
        _name(axes, label, point, spans, theme)


def _name(axes: Axes, label: str, point: tuple[float, float], spans: list[tuple[float, float]], theme: Theme) -> None:
    """Write the label above or below its point, towards the middle of the panel so that it stays inside."""
    if label == BASE:
        return _write(axes, label, point, (-6, -7), ("right", "top"), theme)
    across, up = ((value - low) / ((high - low) or 1) for value, (low, high) in zip(point, spans, strict=True))
    side = "left" if across < 0.35 else "right" if across > 0.65 else "center"
    offset = ({"left": 6, "right": -6, "center": 0}[side], 8 if up > 0.4 else -9)
    return _write(axes, label, point, offset, (side, "bottom" if up > 0.4 else "top"), theme)


def _write(
    axes: Axes,
    label: str,
    point: tuple[float, float],
    offset: tuple[int, int],
    alignment: tuple[str, str],
    theme: Theme,
) -> None:
    axes.annotate(
        label,
        point,
        xytext=offset,
        textcoords="offset points",
        ha=alignment[0],
        va=alignment[1],
        color=theme.ink,
        fontsize=8.5,
        fontweight="bold",
        zorder=6,
        path_effects=[withStroke(linewidth=3, foreground=theme.background)],
    )


def _dial_path(axes: Axes, analysis: Analysis, names: tuple[str, str], theme: Theme) -> None:
    """The equal-weights blend as lambda grows, from the base outwards."""
    equal = _sweeps(analysis).get(_equal_label(analysis))
    if equal is None:
        return
    axes.plot(
        equal[names[0]],
        equal[names[1]],
        color=theme.muted,
        linewidth=1.1,
        linestyle=(0, (1, 2)),
        zorder=1,
        label="λ dial, equal weights",
    )
    for row in equal.to_dict("records"):
        if row["kl_lambda"] not in (0, 1):
            axes.scatter(row[names[0]], row[names[1]], s=9, color=theme.muted, zorder=2)
            axes.annotate(
                f"λ {row['kl_lambda']:g}",
                (row[names[0]], row[names[1]]),
                xytext=(4, -9),
                textcoords="offset points",
                color=theme.muted,
                fontsize=7.5,
            )


def _equal_label(analysis: Analysis) -> str:
    weights = equal_weights(len(analysis.basis))
    row = {f"w_{name}": weight for name, weight in zip(analysis.basis, weights, strict=True)}
    return preference_label(row, analysis.basis)


def _sweeps(analysis: Analysis, method: str = "mpa") -> dict[str, pd.DataFrame]:
    """Per preference that was measured at more than one lambda: its rows by lambda, the base first."""
    summary = analysis.summary
    base = summary[summary["method"] == BASE]
    table = summary[summary["method"].isin([method, ADAPTER])].copy()
    table["mix"] = [preference_label(row, analysis.basis) for row in table.to_dict("records")]
    found = {}
    for mix, rows in table.groupby("mix", sort=False):
        if rows["kl_lambda"].nunique() > 1:
            found[str(mix)] = pd.concat([base, rows]).sort_values("kl_lambda")
    return found


def _dial_panel(axes: Axes, analysis: Analysis, table: pd.DataFrame, theme: Theme) -> None:
    x = table["kl_lambda"].to_numpy()
    axes.axhline(0, color=theme.muted, linewidth=1)
    axes.axvline(1, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    for index, name in enumerate(analysis.axes()):
        sd = analysis.scales[name].sd
        colour = theme.series[index % len(theme.series)]
        mean, low, high = (table[f"{name}_gain{end}"].to_numpy() / sd for end in ("", "_low", "_high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, linewidth=1.8, marker="os^Dv"[index % 5], markersize=4.5, label=name)
    axes.set_xticks(sorted(set(x)), [f"{value:g}" for value in sorted(set(x))])
    quiet(axes, theme, grid="y")


def _dots(axes: Axes, table: pd.DataFrame, y: np.ndarray, method: str, theme: Theme) -> None:
    colour = theme.colour(method)
    axes.hlines(y, table["share_low"], table["share_high"], color=colour, linewidth=2, alpha=0.55)
    axes.scatter(table["share"], y, s=40, marker=marker(method), color=colour, zorder=3, label=method_label(method))
