"""Figures of what fidelity costs in compute, and what reward costs in distance from the base model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ADAPTER, BASE, ORACLE
from workers.evaluation.labels import method_label, preference_label
from workers.evaluation.placing import Label, Point, along, place, point_label, settle
from workers.evaluation.plots import BLENDS
from workers.evaluation.plots_retraining import measured_everywhere
from workers.evaluation.style import LIGHT, Theme, as_percent, legend, marker, new_figure, panels, png, quiet, title

LOG_FROM = 5.0  # a wider range of costs than this is drawn on a logarithmic axis
MOST_PANELS = 4


def cost_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """UNet rows per image against the share of the gain, per method; None where no share is defined."""
    table = costs(analysis)
    if table.empty:
        return None
    figure = new_figure(theme, 7.6, 4.4)
    axes = figure.subplots()
    for row in table.to_dict("records"):
        colour = theme.colour(row["method"])
        axes.vlines(row["rows"], row["low"], row["high"], color=colour, linewidth=2, alpha=0.5, zorder=2)
        size = 150 if row["method"] == ORACLE else 52
        axes.scatter(row["rows"], row["share"], s=size, marker=marker(row["method"]), color=colour, zorder=3)
    against = "a retrained model's gain" if not analysis.rivals.empty else "the adapters' own gains"
    axes.axhline(1, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylabel(f"share of {against}")
    axes.set_xlabel("UNet rows per image (below: as multiples of a base image)")
    axes.yaxis.set_major_formatter(as_percent)
    _cost_axis(axes, table["rows"], float(analysis.summary.iloc[0]["rows"]))
    axes.margins(y=0.12)
    quiet(axes, theme)
    settle(figure)
    place(axes, [_named(row, theme) for row in table.to_dict("records")], theme)
    return png(figure)


def costs(analysis: Analysis) -> pd.DataFrame:
    """Per method: rows, share, low, high; of the oracle's gain where there are oracles, else of the adapters'."""
    if not analysis.rivals.empty:
        name, table = "share_of_oracle", measured_everywhere(analysis.rivals)
    else:
        name, table = "share", analysis.overall
        if not table.empty:
            plain = analysis.summary[analysis.summary["kl_lambda"] == 1]
            table = table.assign(rows=table["method"].map(plain.groupby("method")["rows"].mean()))
    if table.empty:
        return pd.DataFrame(columns=["method", "rows", "share", "low", "high"])
    table = table.rename(columns={name: "share", f"{name}_low": "low", f"{name}_high": "high"})
    return table[["method", "rows", "share", "low", "high"]].dropna(subset=["rows", "share"])


def reward_kl_png(analysis: Analysis, theme: Theme = LIGHT) -> bytes | None:
    """Weighted gain against the path KL to the base, per method and preference; None where KL was not measured."""
    found = measured_kl(analysis)
    if not found:
        return None
    figure, places = panels(theme, len(found), 3.8, 3.2)
    for axes, (mix, table) in zip(places, found.items(), strict=True):
        _kl_panel(axes, table, theme)
        title(axes, mix, theme)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("weighted gain\nin base standard deviations")
    legend(figure, theme)
    settle(figure)
    for axes, table in zip(places, found.values(), strict=True):
        place(axes, _strengths(table, theme), theme, size=8, others=_occupied(table))
    return png(figure)


def _named(row: dict, theme: Theme) -> Label:
    own = row["method"] == ORACLE
    text = "retrained model" if own else method_label(row["method"])
    return Label(text, row["rows"], row["share"], row["low"], row["high"], theme.ink, bold=own)


def _cost_axis(axes: Axes, rows: pd.Series, base: float) -> None:
    low, high = rows.min() / base, rows.max() / base
    if high / low > LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low * base / 1.25, high * base * 2)
        steps = [float(2**power) for power in range(int(np.floor(np.log2(low))), int(np.ceil(np.log2(high))) + 1)]
    else:
        axes.set_xlim(base * (low - 0.15 * (high - low) - 0.1), base * (high + 0.35 * (high - low) + 0.3))
        steps = [float(step) for step in range(1, int(np.ceil(high)) + 1)]
    axes.xaxis.set_major_locator(FixedLocator([step * base for step in steps]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}\n{value / base:g}×")


def measured_kl(analysis: Analysis) -> dict[str, pd.DataFrame]:
    """Per preference, the rows with a path KL: those measured at most strengths first, no more than fit."""
    table = analysis.summary[~analysis.summary["method"].isin([BASE])].dropna(subset=["path_kl", "weighted_gain"])
    if table.empty:
        return {}
    # an adapter alone is the blend at full strength, and belongs to its sweep
    table = table.assign(
        mix=[preference_label(row, analysis.basis) for row in table.to_dict("records")],
        method=table["method"].replace(ADAPTER, "mpa"),
    )
    groups = {str(mix): rows for mix, rows in table.groupby("mix", sort=False)}
    several = [mix for mix, rows in groups.items() if len(rows) > 1]
    ranked = sorted(several, key=lambda mix: (-groups[mix]["kl_lambda"].nunique(), -groups[mix]["method"].nunique()))
    return {mix: groups[mix].sort_values("kl_lambda") for mix in ranked[:MOST_PANELS]}


def _kl_panel(axes: Axes, table: pd.DataFrame, theme: Theme) -> None:
    """One preference: a method's points are connected from the base where it was measured at several strengths."""
    for name, rows in table.groupby("method", sort=False):
        method = str(name)
        x, y, colour = rows["path_kl"], rows["weighted_gain"], theme.colour(method)
        ends = rows["weighted_gain_low"], rows["weighted_gain_high"]
        axes.vlines(x, *ends, color=colour, linewidth=1.6, alpha=0.45)
        if _is_sweep(rows):
            axes.plot([0, *x], [0, *y], color=colour, linewidth=1.4, alpha=0.8, zorder=2)
        size = 90 if method == ORACLE else 40
        axes.scatter(x, y, s=size, marker=marker(method), color=colour, zorder=3, label=method_label(method))
    axes.scatter(0, 0, s=42, color=theme.ink, zorder=4)
    axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=1)
    axes.set_xlabel("path KL from the base  (nats)")
    axes.margins(0.12)
    quiet(axes, theme)


def _is_sweep(rows: pd.DataFrame) -> bool:
    """Whether these rows of one method are a dial that was turned; oracles are trainings apart."""
    return len(rows) > 1 and rows["method"].iloc[0] in BLENDS


def _strengths(table: pd.DataFrame, theme: Theme) -> list[Label]:
    swept = table[table.groupby("method")["kl_lambda"].transform("size") > 1]
    swept = swept[swept["method"] != ORACLE]
    return [
        point_label("base", 0.0, 0.0, theme.ink, bold=True),
        *(
            Label(f"λ {row['kl_lambda']:g}", row["path_kl"], row["weighted_gain"], *_interval(row), theme.muted)
            for row in swept.to_dict("records")
        ),
    ]


def _interval(row: dict) -> tuple[float, float]:
    return row["weighted_gain_low"], row["weighted_gain_high"]


def _occupied(table: pd.DataFrame) -> list[Point]:
    """Where labels must not go: all points, their intervals, and the lines through them."""
    points = list(zip(table["path_kl"], table["weighted_gain"], strict=True))
    for row in table.to_dict("records"):
        points += along([(row["path_kl"], end) for end in _interval(row)])
    for _, rows in table.groupby("method", sort=False):
        if _is_sweep(rows):
            points += along([(0.0, 0.0), *zip(rows["path_kl"], rows["weighted_gain"], strict=True)])
    return points
