"""The picture of cost against fidelity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fidelity_parts.runs import BASE
from matplotlib.axes import Axes

from workers.evaluation.style import LIGHT, new_figure, png, quiet

_LABELS = {"mpa": "exact", "ls": "ls, mirrored"}
_COLOURS = {"staged": "#0072b2", "cached": "#00805e", "ls": "#d98200", "soup": "#8a4f9e"}


def draw(modes: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Return a PNG: latent distance above, share of hypervolume below, a column for each number of steps."""
    figure = new_figure(LIGHT, 3.9 * len(modes), 6.6)
    panels = figure.subplots(2, len(modes), squeeze=False, sharex=True, sharey="row")
    for column, (steps, figures) in enumerate(sorted(modes.items())):
        above, below = panels[0][column], panels[1][column]
        _panel(above, figures, "latent_rmse")
        _panel(below, figures, "hypervolume_share", scale=100)
        above.set_title(f"{steps} steps", fontsize=10, color=LIGHT.ink)
        above.axhline(figures["ls, independent"]["latent_rmse"] / 3, color=LIGHT.muted, linewidth=0.8, linestyle=":")
        below.axhline(98, color=LIGHT.muted, linewidth=0.8, linestyle=":")
        below.set_xlabel("UNet rows, in those of one model", fontsize=9)
    panels[0][0].set_ylabel("distance of latents to the exact blend", fontsize=9)
    panels[1][0].set_ylabel("hypervolume, % of the exact blend's", fontsize=9)
    return png(figure)


def _panel(axes: Axes, figures: Mapping[str, Mapping[str, Any]], key: str, scale: float = 1.0) -> None:
    quiet(axes, LIGHT)
    for name, found in figures.items():
        if name == BASE:
            continue
        low, high = (scale * value for value in found[f"{key}_interval"])
        colour = _COLOURS.get(name.split(" ")[0].rstrip(","), LIGHT.ink)
        x, y = found["rows_ratio"], scale * found[key]
        axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot([x], [y], "o", color=colour, markersize=5)
        axes.annotate(_LABELS.get(name, name), (x, y), (5, 3), textcoords="offset points", fontsize=7.5, color=colour)
    axes.set_xlim(0.8, 3.6)
