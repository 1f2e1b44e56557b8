"""How the figures look: two themes, colours that colour-blind readers can tell apart, quiet axes.

Colours are Okabe and Ito's; every method also has a marker of its own, so nothing depends on colour alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 200
MARKERS = {"mpa": "o", "ls": "^", "soup": "s", "staged": "D", "cached": "v"}
SPARE_MARKERS = ("P", "X", "p")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one appearance."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    methods: dict[str, str]
    series: tuple[str, ...]

    def colour(self, method: str) -> str:
        """A method's colour; methods without one of their own share the ink."""
        return self.methods.get(method, self.ink)


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1c2128",
    "#626b76",
    "#e6e9ed",
    {"mpa": "#0072b2", "ls": "#d98200", "soup": "#00805e", "staged": "#b0578d", "cached": "#626b76"},
    ("#b3450a", "#8a4f9e", "#1f78a8", "#6b6b00", "#a8326b", "#44546a"),
)
DARK = Theme(
    "dark",
    "#171a1f",
    "#e8eaed",
    "#a0a8b3",
    "#2e343c",
    {"mpa": "#5cb8f0", "ls": "#f2ae3d", "soup": "#3fcf9f", "staged": "#e48fc3", "cached": "#a0a8b3"},
    ("#ff9a5c", "#d9a3ea", "#7cc8ef", "#d6d36a", "#f29ac0", "#b8c4d6"),
)


def marker(method: str) -> str:
    """The marker of a method, the same in every figure."""
    return MARKERS.get(method) or SPARE_MARKERS[sum(map(ord, method)) % len(SPARE_MARKERS)]


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure of that size in inches, outside pyplot so that threads do not meet."""
    return Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")


def quiet(axes: Axes, theme: Theme, *, grid: str = "both") -> None:
    """Keep two thin axis lines and a faint grid behind the data."""
    axes.set_facecolor(theme.background)
    axes.grid(True, axis=grid, color=theme.grid, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(9.5)


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()
