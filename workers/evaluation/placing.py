"""Names written beside their points, where they cover neither points, intervals nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, sin

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from workers.evaluation.style import Theme

# Right, left, above, below, then the corners; first close to the point, then farther out with a line to it.
ANGLES = tuple(quarter * pi / 4 for quarter in (0, 4, 2, 6, 1, 7, 3, 5))
DISTANCES = (8.0, 16.0, 26.0, 38.0, 52.0)
POINT, STROKE = 5.0, 3


Point = tuple[float, float]
Box = NDArray[np.float64]  # left, bottom, right, top in pixels


@dataclass(frozen=True, slots=True)
class Label:
    """A text for the point (x, y) in data coordinates, whose vertical interval is to stay free too."""

    text: str
    x: float
    y: float
    low: float
    high: float
    colour: str
    bold: bool = False


def point_label(text: str, x: float, y: float, colour: str, *, bold: bool = False) -> Label:
    """A label for a point without an interval."""
    return Label(text, x, y, y, y, colour, bold)


def settle(figure: Figure) -> None:
    """Fix the layout, so that sizes of texts and places of points are known."""
    figure.draw_without_rendering()


def along(points: Sequence[Point], parts: int = 12) -> list[Point]:
    """Points of the line through these, for labels to keep clear of."""
    return [
        (x + (to_x - x) * part / parts, y + (to_y - y) * part / parts)
        for (x, y), (to_x, to_y) in pairwise(points)
        for part in range(1, parts)
    ]


def place(
    axes: Axes,
    labels: Sequence[Label],
    theme: Theme,
    *,
    size: float = 8.5,
    others: Sequence[Point] = (),
) -> None:
    """Write the labels clear of their points and of `others`; only once the figure's layout is settled."""
    scale = axes.figure.dpi / 72
    taken = [_obstacle(axes, label, POINT * scale) for label in labels]
    taken += [_obstacle(axes, point_label("", x, y, theme.ink), POINT * scale / 2) for x, y in others]
    choices = [(distance, angle) for distance in DISTANCES for angle in ANGLES]
    inside = np.array([axes.get_window_extent().extents])
    for label in sorted(labels, key=lambda one: -one.y):
        point, size_of = axes.transData.transform((label.x, label.y)), _extent(axes, label, size)
        boxes = np.array([_box(point, size_of, distance * scale, angle) for distance, angle in choices])
        # what is covered counts most, then what sticks out, then the distance; ties go to the earlier choice
        outside = size_of[0] * size_of[1] - _common(boxes, inside)
        cost = 3 * _common(boxes, np.array(taken)) + 2 * outside + [distance for distance, _ in choices]
        best = int(cost.round(3).argmin())
        taken.append(boxes[best])
        _write(axes, label, choices[best], theme, size)


def _obstacle(axes: Axes, label: Label, reach: float) -> Box:
    x, y = axes.transData.transform((label.x, label.y))
    low, high = (axes.transData.transform((label.x, end))[1] for end in (label.low, label.high))
    return np.array([x - reach, min(low, y - reach), x + reach, max(high, y + reach)])


def _extent(axes: Axes, label: Label, size: float) -> tuple[float, float]:
    probe = axes.text(0, 0, label.text, fontsize=size, fontweight=_weight(label))
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def _weight(label: Label) -> str:
    return "bold" if label.bold else "normal"


def _alignment(angle: float) -> tuple[str, str]:
    across, up = round(cos(angle), 3), round(sin(angle), 3)
    return (
        "left" if across > 0 else "right" if across < 0 else "center",
        "bottom" if up > 0 else "top" if up < 0 else "center",
    )


def _box(point: Point, size: tuple[float, float], distance: float, angle: float) -> Box:
    across, up = _alignment(angle)
    x, y = point[0] + distance * cos(angle), point[1] + distance * sin(angle)
    left = x - {"left": 0.0, "right": size[0], "center": size[0] / 2}[across]
    bottom = y - {"bottom": 0.0, "top": size[1], "center": size[1] / 2}[up]
    return np.array([left, bottom, left + size[0], bottom + size[1]])


def _common(boxes: Box, others: Box) -> Box:
    """The area of each box [n, 4] that all the others [m, 4] together cover, counted as often as it is covered."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2).sum(axis=1)


def _write(axes: Axes, label: Label, where: tuple[float, float], theme: Theme, size: float) -> None:
    distance, angle = where
    across, up = _alignment(angle)
    line = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    note = axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(distance * cos(angle), distance * sin(angle)),
        textcoords="offset points",
        ha=across,
        va=up,
        color=label.colour,
        fontsize=size,
        fontweight=_weight(label),
        zorder=6,
        path_effects=[withStroke(linewidth=STROKE, foreground=theme.background)],
        arrowprops=line if distance > DISTANCES[0] else None,
    )
    # the layout is settled: a label must not move it again
    note.set_in_layout(False)
