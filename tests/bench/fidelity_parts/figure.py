"""The picture of cost against fidelity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fidelity_parts.runs import BASE, INDEPENDENT
from matplotlib.axes import Axes

from workers.evaluation.style import LIGHT, new_figure, png, quiet

# name in the figures: label, colour, marker
_LOOKS = {
    "mpa": ("exact blend (mpa)", "#1c2128", "*"),
    "staged 1.0": ("staged, budget 1.0", "#0072b2", "o"),
    "staged 1.25": ("staged, budget 1.25", "#0072b2", "s"),
    "staged 1.5": ("staged, budget 1.5", "#0072b2", "D"),
    "ls": ("ls, mirrored (default)", "#d98200", "o"),
    "ls, systematic": ("ls, systematic", "#d98200", "s"),
    INDEPENDENT: ("ls, independent (paper)", "#d98200", "X"),
    "soup": ("soup", "#8a4f9e", "o"),
    "cached 5": ("cached, every 5 steps", "#00805e", "o"),
    "cached 10": ("cached, every 10 steps", "#00805e", "s"),
    "shared unconditional": ("mpa, shared unconditional", "#a8326b", "o"),
    "guidance to 0.8": ("mpa, guidance to 0.8", "#a8326b", "s"),
}
_DODGE = 0.04  # of one model's rows, between modes that cost the same


def draw(modes: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Return a PNG: latent distance above, share of hypervolume below, a column for each number of steps."""
    figure = new_figure(LIGHT, 3.9 * len(modes), 7.2)
    panels = figure.subplots(2, len(modes), squeeze=False, sharex=True, sharey="row")
    for column, (steps, figures) in enumerate(sorted(modes.items())):
        above, below = panels[0][column], panels[1][column]
        _panel(above, figures, "latent_rmse")
        _panel(below, figures, "hypervolume_share", scale=100)
        above.set_title(f"{steps} steps", fontsize=10, color=LIGHT.ink)
        above.axhline(figures[INDEPENDENT]["latent_rmse"] / 3, color=LIGHT.muted, linewidth=0.9, linestyle=":")
        below.axhline(98, color=LIGHT.muted, linewidth=0.9, linestyle=":")
        below.set_xlabel("UNet rows per image, in those of one model", fontsize=9)
    panels[0][0].set_ylabel("distance of latents to the exact blend", fontsize=9)
    panels[1][0].set_ylabel("hypervolume, % of the exact blend's", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    return png(figure)


def _panel(axes: Axes, figures: Mapping[str, Mapping[str, Any]], key: str, scale: float = 1.0) -> None:
    quiet(axes, LIGHT)
    costs = [figures[name]["rows_ratio"] for name in _LOOKS]
    taken: dict[float, int] = {}
    for name, (label, colour, marker) in _LOOKS.items():
        found = figures[name]
        cost = found["rows_ratio"]
        place = taken[cost] = taken.get(cost, -1) + 1
        x = cost + _DODGE * (place - (costs.count(cost) - 1) / 2)
        low, high = (scale * value for value in found[f"{key}_interval"])
        axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot([x], [scale * found[key]], marker, color=colour, markersize=10 if marker == "*" else 6, label=label)
    assert {BASE, *_LOOKS} == set(figures), "a mode without a look"
    axes.set_xlim(0.8, 3.2)
