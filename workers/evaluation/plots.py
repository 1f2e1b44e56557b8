"""Figures of how much of the gains a mix keeps and of the lambda dial, and the rows that all figures pick from."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from blend.preference import METHODS
from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ADAPTER, BASE, ORACLE
from workers.evaluation.labels import method_label, preference_label
from workers.evaluation.style import LIGHT, Theme, as_percent, legend, marker, new_figure, panels, png, quiet, title

BLENDS = frozenset(METHODS)


def mixes(analysis: Analysis) -> pd.DataFrame:
    """Rows that mix adapters at lambda 1: the blends, and the rivals too where no table of their own shows them."""
    table = analysis.summary
    table = table[~table["method"].isin([BASE, ADAPTER, ORACLE]) & (table["kl_lambda"] == 1)]
    return table if analysis.rivals.empty else table[table["method"].isin(BLENDS)]


def sweeps(analysis: Analysis, method: str = "mpa") -> dict[str, pd.DataFrame]:
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


def shares_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Share of the adapters' own gain kept by each method at each preference; None where undefined."""
    table = mixes(analysis).dropna(subset=["share"])
    if table.empty:
        return None
    labels = [preference_label(row, analysis.basis) for row in table.to_dict("records")]
    order = list(dict.fromkeys(labels))
    methods = list(dict.fromkeys(table["method"]))
    figure = new_figure(theme, 7.6, 1.0 + max(0.46, 0.12 * len(methods)) * len(order))
    axes = figure.subplots()
    for rank, method in enumerate(methods):
        mine = table[table["method"] == method]
        at = [order.index(label) for label, same in zip(labels, table["method"] == method, strict=True) if same]
        y = np.array(at) + (rank - (len(methods) - 1) / 2) * min(0.22, 0.88 / len(methods))
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
    axes.xaxis.set_major_formatter(as_percent)
    axes.set_xlabel("share of the gain that each adapter alone makes in its own reward")
    quiet(axes, theme, grid="x")
    axes.tick_params(axis="y", labelcolor=theme.ink)
    legend(figure, theme)
    return png(figure)


def dial_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Gain in each reward as the KL dial turns from the base past the tuned model; None without a sweep."""
    turned = sweeps(analysis)
    if not turned:
        return None
    figure, found = panels(theme, len(turned), 3.4, 2.9, share_y=True)
    for axes, (label, table) in zip(found, turned.items(), strict=True):
        _dial_panel(axes, analysis, table, theme)
        title(axes, label, theme)
        axes.set_xlabel("λ  (0 base, 1 tuned)")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("gain over the base\nin base standard deviations")
    legend(figure, theme)
    return png(figure)


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
