"""Renders a caption as a 64 x 64 scene; everything the caption leaves open is drawn from the seed.

Backgrounds are the free variable: plain or patterned, pale or vivid. The first-named of two objects stands on the left.
"""

from __future__ import annotations

import colorsys
import random

import numpy as np
from PIL import Image, ImageDraw

from blend.sprites.art import RGB, draw_sprite
from blend.sprites.captions import Thing, parse_caption

SIZE = 64
_OVERSAMPLE = 2


def render(caption: str, seed: int) -> np.ndarray:
    """The scene of a caption as uint8 [64, 64, 3]; ValueError for a caption outside the grammar."""
    return render_things(parse_caption(caption), random.Random(seed))


def render_things(things: tuple[Thing, ...], rng: random.Random) -> np.ndarray:
    """The scene of one or two things as uint8 [64, 64, 3]."""
    image = _background(rng)
    if len(things) == 1:
        _place(image, things[0], rng, centre=32.0, spread=6.0, sizes=(42.0, 56.0))
    else:
        _place(image, things[0], rng, centre=16.5, spread=1.5, sizes=(27.0, 31.0))
        _place(image, things[1], rng, centre=47.5, spread=1.5, sizes=(27.0, 31.0))
    return np.asarray(image)


def _place(
    image: Image.Image,
    thing: Thing,
    rng: random.Random,
    *,
    centre: float,
    spread: float,
    sizes: tuple[float, float],
) -> None:
    size = rng.uniform(*sizes)
    room = max(0.0, (SIZE - size) / 2 - 1)
    x = centre + rng.uniform(-1, 1) * min(spread, room)
    y = SIZE / 2 + rng.uniform(-1, 1) * min(9.0, room)
    flip = rng.random() < 0.5
    if rng.random() < 0.6:
        _shadow(image, x, y + 0.44 * size, size)
    sprite = draw_sprite(thing.object, thing.colour, flip=flip).resize(
        (round(size), round(size)), Image.Resampling.BOX, reducing_gap=None
    )
    image.paste(sprite, (round(x - size / 2), round(y - size / 2)), sprite)


def _shadow(image: Image.Image, x: float, y: float, size: float) -> None:
    veil = Image.new("L", image.size, 0)
    ImageDraw.Draw(veil).ellipse([x - 0.4 * size, y - 0.07 * size, x + 0.4 * size, y + 0.07 * size], fill=90)
    image.paste((30, 28, 40), (0, 0), veil)


def _background(rng: random.Random) -> Image.Image:
    kind = rng.choices(("solid", "gradient", "horizon", "checks", "stripes", "dots"), (26, 24, 20, 10, 10, 10))[0]
    one, other = _background_colours(rng)
    side = SIZE * _OVERSAMPLE
    image = Image.new("RGB", (side, side), one)
    canvas = ImageDraw.Draw(image)
    if kind == "gradient":
        mask = Image.linear_gradient("L").resize((SIZE, SIZE))
        return Image.composite(Image.new("RGB", (SIZE, SIZE), other), Image.new("RGB", (SIZE, SIZE), one), mask)
    if kind == "horizon":
        canvas.rectangle([0, rng.uniform(0.5, 0.8) * side, side, side], fill=other)
    elif kind == "checks":
        _checks(canvas, other, step=side // rng.choice((4, 8)))
    elif kind == "stripes":
        step = side // rng.choice((4, 8))
        for start in range(0, side, 2 * step):
            canvas.rectangle([0, start, side, start + step - 1], fill=other)
    elif kind == "dots":
        _dots(canvas, other, step=side // rng.choice((4, 5)))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _checks(canvas: ImageDraw.ImageDraw, fill: RGB, *, step: int) -> None:
    side = SIZE * _OVERSAMPLE
    for row, top in enumerate(range(0, side, step)):
        for column, left in enumerate(range(0, side, step)):
            if (row + column) % 2:
                canvas.rectangle([left, top, left + step - 1, top + step - 1], fill=fill)


def _dots(canvas: ImageDraw.ImageDraw, fill: RGB, *, step: int) -> None:
    side = SIZE * _OVERSAMPLE
    radius = step * 0.28
    for top in range(step // 2, side + step, step):
        for left in range(step // 2, side + step, step):
            canvas.ellipse([left - radius, top - radius, left + radius, top + radius], fill=fill)


def _background_colours(rng: random.Random) -> tuple[RGB, RGB]:
    """Two neighbouring colours: mostly pale, one in three vivid, one in ten grey."""
    mood = rng.choices(("pale", "vivid", "grey"), (60, 30, 10))[0]
    hue = rng.random()
    saturation = {"pale": rng.uniform(0.05, 0.35), "vivid": rng.uniform(0.35, 0.75), "grey": 0.04}[mood]
    value = {
        "pale": rng.uniform(0.85, 1.0),
        "vivid": rng.uniform(0.65, 0.95),
        "grey": rng.uniform(0.45, 0.9),
    }[mood]
    one = colorsys.hsv_to_rgb(hue, saturation, value)
    other = colorsys.hsv_to_rgb(
        (hue + rng.uniform(-0.12, 0.12)) % 1.0,
        min(1.0, saturation * rng.uniform(0.6, 1.4)),
        max(0.3, min(1.0, value + rng.choice((-1, 1)) * rng.uniform(0.08, 0.2))),
    )
    return _to_rgb(one), _to_rgb(other)


def _to_rgb(colour: tuple[float, float, float]) -> RGB:
    red, green, blue = (round(255 * channel) for channel in colour)
    return red, green, blue
