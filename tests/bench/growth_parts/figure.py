"""The picture of more rewards: what each of them gains, and what an image costs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from growth_parts.tables import DRAWN
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from workers.evaluation.grid import ADAPTER
from workers.evaluation.labels import method_label
from workers.evaluation.style import LIGHT, Theme, marker, new_figure, png, quiet, title

LABELS = {DRAWN: "One adapter per image"}
DODGE = 0.07  # of a reward, between methods
ROOM = 2.8  # right of the last point, for the names, in rewards
LEADER = 0.35  # of that for the line to a name
FONT = 8.5
LEADING = 1.35  # from one name to the next, in heights of one


def draw(table: pd.DataFrame, theme: Theme = LIGHT) -> bytes:
    """Return a PNG of the growth table: gain per reward on the left, UNet rows of an image on the right."""
    figure = new_figure(theme, 11.2, 4.2)
    gains, costs = figure.subplots(1, 2)
    title(gains, "gain of each reward in the mix, in base standard deviations", theme)
    title(costs, "UNet rows per image, as multiples of a base image", theme)
    _panel(gains, table, "gain", theme)
    _panel(costs, table[table["method"] != DRAWN], "rows_ratio", theme)
    for axes in (gains, costs):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    figure.draw_without_rendering()
    _name_ends(figure, gains, table, "gain", theme)
    _name_ends(figure, costs, table[table["method"] != DRAWN], "rows_ratio", theme)
    return png(figure)


def _panel(axes: Axes, table: pd.DataFrame, name: str, theme: Theme) -> None:
    """Every method's line begins at one reward, where all of them are the adapter."""
    alone, lines = table[table["method"] == ADAPTER].iloc[0], _lines(table)
    for rank, (method, rows) in enumerate(lines.items()):
        colour, drawn = _colour(method, theme), method == DRAWN
        x = rows["rewards"] + (rank - (len(lines) - 1) / 2) * DODGE
        style = {"linestyle": (0, (4, 3)), "linewidth": 1.3} if drawn else {"linewidth": 1.8}
        axes.plot([1, *x], [alone[name], *rows[name]], color=colour, zorder=2, alpha=0.85, **style)
        if not drawn:
            axes.vlines(x, rows[f"{name}_low"], rows[f"{name}_high"], color=colour, linewidth=2.2, alpha=0.45)
            axes.scatter(x, rows[name], s=44, marker=marker(method), color=colour, zorder=3)
    axes.vlines(1, alone[f"{name}_low"], alone[f"{name}_high"], color=theme.ink, linewidth=2.2, alpha=0.45)
    axes.scatter(1, alone[name], s=44, color=theme.ink, zorder=4)
    counts = sorted(table["rewards"].unique())
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlim(0.6, counts[-1] + ROOM)
    axes.set_xlabel("rewards in the mix, each of the same weight")
    quiet(axes, theme, grid="y")


def _lines(table: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    mixed = table[table["method"] != ADAPTER]
    return {str(method): rows for method, rows in mixed.groupby("method", sort=False)}


def _colour(method: str, theme: Theme) -> str:
    return theme.ink if method == DRAWN else theme.colour(method)


def _name_ends(figure: Figure, axes: Axes, table: pd.DataFrame, name: str, theme: Theme) -> None:
    """Names at the ends of the lines, moved apart where those meet, each with a thin line to its own."""
    lines = _lines(table)
    end = max(rows["rewards"].iloc[-1] for rows in lines.values()) + DODGE * len(lines) / 2
    heights = {method: float(rows[name].iloc[-1]) for method, rows in lines.items()}
    step = LEADING * FONT / 72 * figure.dpi / (axes.bbox.height / (axes.get_ylim()[1] - axes.get_ylim()[0]))
    for method, height in _apart(heights, step).items():
        to = end + LEADER
        axes.plot([end + 0.04, to], [heights[method], height], color=_colour(method, theme), linewidth=0.7, alpha=0.6)
        axes.text(
            to + 0.06,
            height,
            LABELS.get(method) or method_label(method),
            va="center",
            color=_colour(method, theme),
            fontsize=FONT,
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],
        ).set_in_layout(False)


def _apart(heights: Mapping[str, float], step: float) -> dict[str, float]:
    """The heights in their order, at least a step apart, as little moved as it takes and none below half a step."""
    order = sorted(heights, key=lambda method: heights[method])
    groups: list[list[str]] = []
    for method in order:
        groups.append([method])
        while len(groups) > 1 and _bottom(groups[-1], heights, step) < _top(groups[-2], heights, step) + step:
            last = groups.pop()
            groups[-1] += last
    return {
        method: _bottom(group, heights, step) + place * step for group in groups for place, method in enumerate(group)
    }


def _bottom(group: list[str], heights: Mapping[str, float], step: float) -> float:
    middle = sum(heights[method] for method in group) / len(group)
    return max(middle - step * (len(group) - 1) / 2, step / 2)


def _top(group: list[str], heights: Mapping[str, float], step: float) -> float:
    return _bottom(group, heights, step) + step * (len(group) - 1)
