"""The figure of what changed since an earlier evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from workers.evaluation.labels import method_label
from workers.evaluation.style import LIGHT, Theme, as_percent, legend, marker, new_figure, png, quiet, title

Line = Mapping[str, Any]
APART = 0.14


def drift_png(comparison: Mapping[str, Any] | None, theme: Theme = LIGHT) -> bytes | None:
    """Reward space of each front and share of the gain of each method, then and now; None without a comparison."""
    parts = [
        (name, lines, key, shares)
        for name, lines, key, shares in (
            ("reward space reached (hypervolume)", lines_of(comparison, "fronts"), "front", False),
            ("share of the adapters' gains kept", lines_of(comparison, "methods"), "method", True),
        )
        if lines
    ]
    if not parts:
        return None
    figure = new_figure(theme, 7.6, 0.7 + sum(0.75 + 0.42 * len(lines) for _, lines, _, _ in parts))
    heights = [0.6 + len(lines) for _, lines, _, _ in parts]
    for axes, (name, lines, key, shares) in zip(
        figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0], parts, strict=True
    ):
        _panel(axes, lines, key, theme)
        title(axes, name, theme)
        if shares:
            axes.xaxis.set_major_formatter(as_percent)
    legend(figure, theme)
    return png(figure)


def lines_of(comparison: Mapping[str, Any] | None, part: str) -> list[Line]:
    """The comparison's lines of that part with a figure on both sides."""
    lines = (comparison or {}).get(part) or []
    return [line for line in lines if all((line.get(side) or {}).get("mean") is not None for side in ("then", "now"))]


def _panel(axes: Axes, lines: Sequence[Line], key: str, theme: Theme) -> None:
    for y, line in enumerate(lines):
        # fronts at any strength share the look of their method
        method = line[key].partition(", ")[0]
        colour = theme.colour(method)
        then, now = line["then"], line["now"]
        shape = marker(method)
        _bar(axes, then, y - APART, theme.muted)
        _bar(axes, now, y + APART, colour)
        axes.scatter(
            then["mean"], y - APART, s=40, marker=shape, facecolor=theme.background, edgecolor=theme.muted, zorder=3
        )
        axes.scatter(now["mean"], y + APART, s=44, marker=shape, color=colour, zorder=3)
        verdict = line.get("verdict")
        if verdict in ("better", "worse"):
            _mark(axes, verdict, y, theme)
    axes.scatter([], [], marker="o", facecolor=theme.background, edgecolor=theme.muted, label="then (hollow)")
    axes.scatter([], [], marker="o", color=theme.ink, label="now (filled)")
    axes.set_yticks(range(len(lines)), [method_label(line[key]) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    quiet(axes, theme, grid="x")
    axes.tick_params(axis="y", labelcolor=theme.ink)


def _bar(axes: Axes, found: Mapping[str, float], y: float, colour: str) -> None:
    low, high = (found["mean"] if found.get(end) is None else found[end] for end in ("low", "high"))
    axes.hlines(y, low, high, color=colour, linewidth=2, alpha=0.55)


def _mark(axes: Axes, verdict: str, y: float, theme: Theme) -> None:
    """The verdict at the right edge, in words and with an arrow."""
    arrow = "▲" if verdict == "better" else "▼"
    axes.annotate(
        f"{arrow} {verdict}",
        (1.01, y),
        xycoords=("axes fraction", "data"),
        ha="left",
        va="center",
        color=theme.ink,
        fontsize=9,
    )
