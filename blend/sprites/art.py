"""Draws the world's objects: two- or three-tone vector sprites with an ink outline, from art.json.

Shapes live on a 100 x 100 canvas as [kind, tone, numbers, width?]; y grows downwards. "main", "shade" and "light"
follow the caption's colour, the other tones are fixed.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Shape = list[Any]  # [kind, tone, numbers] or [kind, tone, numbers, width]
CANVAS = 256  # pixels per side of a cached sprite: every scene only shrinks it
_UNIT = CANVAS / 108  # leaves a margin of 4 units for the outline
_INK: RGB = (38, 34, 46)
_OUTLINE = 5.0

COLOUR_RGB: dict[str, RGB] = {
    "red": (214, 36, 42),
    "orange": (247, 128, 24),
    "yellow": (250, 212, 40),
    "green": (44, 158, 66),
    "blue": (38, 96, 216),
    "purple": (128, 58, 190),
    "pink": (247, 130, 184),
    "brown": (122, 76, 42),
    "black": (52, 52, 58),
    "white": (244, 244, 240),
}
_FIXED_TONES: dict[str, RGB] = {
    "ink": _INK,
    "white": (250, 250, 248),
    "wood": (140, 92, 54),
    "leaf": (92, 170, 72),
    "beak": (252, 184, 52),
    "glass": (186, 222, 240),
    "blush": (240, 150, 160),
    "coffee": (96, 60, 40),
    "cream": (246, 232, 204),
}


@lru_cache(maxsize=512)
def draw_sprite(name: str, colour: str, *, flip: bool = False) -> Image.Image:
    """One object as an RGBA image of CANVAS x CANVAS pixels, transparent outside its outline."""
    image = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    canvas = ImageDraw.Draw(image)
    tones = _tones(colour)
    shapes = _shapes()[name]
    for shape in shapes:
        _draw_shape(canvas, shape, _INK, grow=_OUTLINE / 2)
    for shape in shapes:
        _draw_shape(canvas, shape, tones[shape[1]], grow=-_OUTLINE / 4)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


@lru_cache(maxsize=1)
def _shapes() -> dict[str, list[Shape]]:
    return json.loads(files("blend.sprites").joinpath("art.json").read_text())


def _tones(colour: str) -> dict[str, RGB]:
    main = COLOUR_RGB[colour]
    return {
        "main": main,
        "shade": _mix(main, _INK, 0.3),
        "light": _mix(main, (255, 255, 255), 0.5),
        **_FIXED_TONES,
    }


def _mix(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, fill: RGB, *, grow: float) -> None:
    kind, _, numbers, *rest = shape
    points = [(float(value) + 4) * _UNIT for value in numbers]
    grown = grow * _UNIT
    if kind == "line":
        _thick_line(canvas, points, fill, float(rest[0]) * _UNIT + 2 * grown)
    elif kind == "poly":
        canvas.polygon(points, fill=fill)
        if grown > 0:
            closed = [*points, *points[:2]]
            for start in range(0, len(points), 2):
                _thick_line(canvas, closed[start : start + 4], fill, 2 * grown)
    else:
        box = [points[0] - grown, points[1] - grown, points[2] + grown, points[3] + grown]
        _draw_boxed(canvas, str(kind), box, fill, rest, grown)


def _draw_boxed(canvas: ImageDraw.ImageDraw, kind: str, box: list[float], fill: RGB, rest: Shape, grown: float) -> None:
    if kind == "ellipse":
        canvas.ellipse(box, fill=fill)
    elif kind == "rect":
        canvas.rounded_rectangle(box, radius=3 * _UNIT, fill=fill)
    elif kind == "pie":
        canvas.pieslice(box, 180, 360, fill=fill)
    else:  # ring and arc: a band of the given width
        width = round(float(rest[0]) * _UNIT + 2 * grown)
        start, end = (0, 360) if kind == "ring" else (0, 180)
        canvas.arc(box, start, end, fill=fill, width=width)


def _thick_line(canvas: ImageDraw.ImageDraw, points: list[float], fill: RGB, width: float) -> None:
    canvas.line(points, fill=fill, width=max(1, round(width)))
    radius = width / 2
    for x, y in zip(points[::2], points[1::2], strict=True):
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
