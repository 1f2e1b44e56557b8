"""How the figures look: two themes, colours that colour-blind readers can tell apart, quiet axes.

Colours are Okabe and Ito's; every method also has a marker of its own, so nothing depends on colour alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from workers.evaluation.rivals import rival_of

DPI = 200
COLUMNS = 3
LONGEST_TITLE = 32
MARKERS = {
    "mpa": "o",
    "ls": "^",
    "soup": "s",
    "staged": "D",
    "cached": "v",
    "oracle": "*",
    "adapters alone": "D",
    "best_of": "P",
    "code": "X",
    "rgg": "p",
    "switch": "<",
    "composite": ">",
}
SPARE_MARKERS = ("h", "8", "d")


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
        return self.methods.get(family(method), self.ink)


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1c2128",
    "#626b76",
    "#e6e9ed",
    {
        "mpa": "#0072b2",
        "ls": "#c47600",
        "soup": "#00805e",
        "staged": "#b0578d",
        "cached": "#626b76",
        "best_of": "#b3450a",
        "code": "#7a5aa6",
        "rgg": "#6b6b00",
        "switch": "#0f7f94",
        "composite": "#8c6d5a",
    },
    ("#b3450a", "#8a4f9e", "#1f78a8", "#6b6b00", "#a8326b", "#44546a"),
)
DARK = Theme(
    "dark",
    "#171a1f",
    "#e8eaed",
    "#a0a8b3",
    "#2e343c",
    {
        "mpa": "#5cb8f0",
        "ls": "#f2ae3d",
        "soup": "#3fcf9f",
        "staged": "#e48fc3",
        "cached": "#a0a8b3",
        "best_of": "#ff9a5c",
        "code": "#bda3f0",
        "rgg": "#d6d36a",
        "switch": "#5fd0de",
        "composite": "#d3b49e",
    },
    ("#ff9a5c", "#d9a3ea", "#7cc8ef", "#d6d36a", "#f29ac0", "#b8c4d6"),
)


def family(method: str) -> str:
    """The method without its numbers: `best_of_4` is of the family `best_of`."""
    rival = rival_of(method)
    return rival.kind if rival else method


def marker(method: str) -> str:
    """The marker of a method, the same in every figure."""
    return MARKERS.get(family(method)) or SPARE_MARKERS[sum(map(ord, method)) % len(SPARE_MARKERS)]


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure of that size in inches, outside pyplot so that threads do not meet."""
    return Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")


def panels(
    theme: Theme, count: int, width: float, height: float, *, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels of that size in inches, three to a row, four as two by two."""
    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(theme, max(5.2, width * columns), height * rows + 0.45)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    found = [axes for row in grid for axes in row]
    for axes in found[count:]:
        axes.set_visible(False)
    return figure, found[:count]


def legend(figure: Figure, theme: Theme) -> None:
    """What the panels show, each thing once, above them."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside upper left",
        ncols=min(len(named), max(2, int(figure.get_figwidth() / 2.1))) or 1,
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
        handletextpad=0.4,
        columnspacing=1.6,
    )


def title(axes: Axes, text: str, theme: Theme) -> None:
    """What a panel is about; a mix of adapters takes a line for each where one line would not hold it."""
    if len(text) > LONGEST_TITLE:
        text = text.replace(" + ", " +\n")
    axes.set_title(text, color=theme.ink, fontsize=10, loc="left")


def as_percent(value: float, _: int = 0) -> str:
    """Tick labels of shares."""
    return f"{value * 100:.0f} %".replace("-", "−")


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
    """The figure as a PNG of 256 colours: a third of the size, and no eye sees the difference."""
    drawn, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    with Image.open(drawn) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(reduced, format="PNG", optimize=True)
    return reduced.getvalue()
