"""The picture of the objectives: reward gained against path KL spent."""

from collections.abc import Mapping
from typing import Any

from matplotlib.lines import Line2D

from workers.evaluation.style import LIGHT, new_figure, png, quiet

_LOOKS = {"dpok": ("#d98200", "s"), "ddpo": ("#8a4f9e", "^"), "grpo": ("#0072b2", "o")}


def draw_objectives(basis: str, objectives: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a PNG: the held-out evaluations of every run joined, with 95 % intervals over images."""
    figure = new_figure(LIGHT, 6.8, 4.4)
    axes = figure.subplots()
    quiet(axes, LIGHT)
    handles = []
    for name, (colour, marker) in _LOOKS.items():
        runs = objectives[name]["paths"] if name in objectives else []
        for path in runs:
            axes.errorbar(
                [point["path_kl"] for point in path],
                [point["gain"] for point in path],
                yerr=[point["held_out_ci"] for point in path],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.2,
                elinewidth=0.8,
                alpha=0.75,
            )
        if runs:
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, label=name))
    axes.set_xlabel("path KL to the base on held-out images, nats")
    axes.set_ylabel(f"gain of {basis}, base standard deviations")
    seeds = max(len(one["paths"]) for one in objectives.values())
    axes.set_title(f"each line one training seed ({seeds} per objective)", fontsize=9, color=LIGHT.muted)
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    return png(figure)
