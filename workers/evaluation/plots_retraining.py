"""Figures that set blends and rivals against oracles: models that were retrained for exactly one preference."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ORACLE
from workers.evaluation.labels import method_label, preference_label
from workers.evaluation.plots import sweeps
from workers.evaluation.style import LIGHT, Theme, as_percent, legend, marker, panels, png, quiet, title

SHARE = "share_of_oracle"


def retraining_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Share of the oracle's gain that each method reaches, over all preferences and at each; None without oracles.

    A method that was not measured at all of them has no place over all.
    """
    ranked = _ranked(analysis)
    if ranked.empty:
        return None
    order = list(ranked["method"])
    overall = measured_everywhere(ranked)
    found = _by_preference(analysis)
    if len(found) != 1:
        found = {f"all {len(found)} mixes" if found else "all mixes": overall} | found
    figure, places = panels(theme, len(found), 3.5, 0.9 + 0.24 * len(order), share_y=True)
    for axes in places[1:]:
        axes.sharex(places[0])
    for axes, (name, table) in zip(places, found.items(), strict=True):
        _dots(axes, table.set_index("method").reindex(order), theme)
        title(axes, name, theme)
        axes.set_xlabel("share of the retrained model's gain")
    places[0].set_yticks(range(len(order)), [method_label(method) for method in order])
    places[0].set_ylim(len(order) - 0.4, -0.6)
    return png(figure)


def dial_retraining_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Gain of the turned dial and of models retrained at the same strength; None without such oracles."""
    table = analysis.oracles
    turned = table[table["kl_lambda"] != 1]
    if turned.empty:
        return None
    turned = turned.assign(mix=[preference_label(row, analysis.basis) for row in turned.to_dict("records")])
    found = {str(mix): rows for mix, rows in turned.groupby("mix", sort=False)}
    figure, places = panels(theme, len(found), 3.6, 3.0, share_y=True)
    for axes, (mix, rows) in zip(places, found.items(), strict=True):
        for method in dict.fromkeys(rows.loc[rows["method"] != ORACLE, "method"]):
            _dial_line(axes, sweeps(analysis, method).get(mix), method, theme)
        _retrained(axes, rows[rows["method"] == ORACLE], theme)
        axes.axhline(0, color=theme.muted, linewidth=1)
        axes.axvline(1, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        title(axes, mix, theme)
        axes.set_xlabel("λ  (0 base, 1 the adapter itself)")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("gain in the preferred reward\nin base standard deviations")
        quiet(axes, theme, grid="y")
    legend(figure, theme)
    return png(figure)


def _ranked(analysis: Analysis) -> pd.DataFrame:
    """The methods over all preferences, the closest to retraining first; the oracle itself is the 100 %."""
    table = analysis.rivals
    table = table[table["method"] != ORACLE].dropna(subset=[SHARE])
    return table.sort_values(SHARE, ascending=False, kind="stable")


def measured_everywhere(rivals: pd.DataFrame) -> pd.DataFrame:
    """The methods whose means are over the same mixes, all there are; another's says nothing beside them."""
    return rivals[rivals["preferences"] == rivals["preferences"].max()]


def _by_preference(analysis: Analysis) -> dict[str, pd.DataFrame]:
    table = analysis.oracles
    table = table[(table["kl_lambda"] == 1) & (table["method"] != ORACLE)].dropna(subset=[SHARE])
    names = [preference_label(row, analysis.basis) for row in table.to_dict("records")]
    return {str(name): rows for name, rows in table.assign(mix=names).groupby("mix", sort=False)}


def _dots(axes: Axes, table: pd.DataFrame, theme: Theme) -> None:
    """One line per method (the index), at the height of its place."""
    for y, (method, row) in enumerate(table.iterrows()):
        if row[SHARE] == row[SHARE]:
            colour = theme.colour(str(method))
            axes.hlines(y, row[f"{SHARE}_low"], row[f"{SHARE}_high"], color=colour, linewidth=2, alpha=0.55)
            axes.scatter(row[SHARE], y, s=40, marker=marker(str(method)), color=colour, zorder=3)
    axes.axvline(0, color=theme.muted, linewidth=1, zorder=1)
    axes.axvline(1, color=theme.ink, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.xaxis.set_major_formatter(as_percent)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    quiet(axes, theme, grid="x")
    axes.tick_params(axis="y", labelcolor=theme.ink)


def _dial_line(axes: Axes, table: pd.DataFrame | None, method: str, theme: Theme) -> None:
    """The dial from the base, whose gain is 0 by definition, to its greatest strength."""
    if table is None:
        return
    colour = theme.colour(method)
    x = table["kl_lambda"].to_numpy()
    mean, low, high = (table[f"weighted_gain{end}"].fillna(0).to_numpy() for end in ("", "_low", "_high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=1.8, marker=marker(method), markersize=5, label=_turned(method))
    axes.set_xticks(sorted(set(x)), [f"{value:g}" for value in sorted(set(x))])


def _turned(method: str) -> str:
    return "turning the dial" if method == "mpa" else f"turning the dial, {method_label(method)}"


def _retrained(axes: Axes, table: pd.DataFrame, theme: Theme) -> None:
    """The retrained models with their intervals."""
    x, y = table["kl_lambda"], table["weighted_gain"]
    ends = table["weighted_gain_low"], table["weighted_gain_high"]
    axes.vlines(x, *ends, color=theme.ink, linewidth=1.6, alpha=0.6, zorder=3)
    axes.scatter(
        x,
        y,
        s=110,
        marker=marker(ORACLE),
        color=theme.ink,
        edgecolor=theme.background,
        linewidth=0.8,
        zorder=4,
        label="retrained at that strength",
    )
