"""The image grid: rows of preferences, columns of prompts, the same seed throughout."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from workers.evaluation.grid import ADAPTER, BASE, ORACLE, Cell, equal_weights

TILE, GAP, MARGIN, LABEL_WIDTH = 128, 6, 16, 236
INK, PAPER, MUTED, LINE = "#1c2128", "#ffffff", "#626b76", "#d3d8de"
LARGEST_THUMBNAIL = 256
Pixels = NDArray[np.uint8]


def pictured_cells(cells: Sequence[Cell]) -> list[int]:
    """Which cells to show, in the order of the rows: along the blend, then along lambda, then the other methods.

    With three or more adapters only even mixes are shown, and those with a retrained model, which follows its mix: the
    grid has to stay readable. Other methods are shown at equal weights, or else where they were measured first.
    """
    count = len(cells[0].weights)
    alone = [index for index, cell in enumerate(cells) if cell.method == ADAPTER]
    retrained = {
        cell.weights: index for index, cell in enumerate(cells) if cell.method == ORACLE and cell.kl_lambda == 1
    }
    mixes = [
        index
        for index, cell in enumerate(cells)
        if cell.method == "mpa"
        and cell.kl_lambda == 1
        and (count == 2 or _even(cell) or _retrained(cell.weights, retrained) is not None)
    ]
    along = sorted(alone + mixes, key=lambda index: -cells[index].weights[0]) if count == 2 else alone + mixes
    found = [(index, _retrained(cells[index].weights, retrained)) for index in along]
    along = [index for pair in found for index in pair if index is not None]
    equal = equal_weights(count)
    dial = [index for index, cell in enumerate(cells) if cell.kl_lambda not in (0, 1) and _same(cell, equal, "mpa")]
    dial.sort(key=lambda index: cells[index].kl_lambda)
    return [0, *along, *dial, *_others(cells, equal)]


def _others(cells: Sequence[Cell], equal: tuple[float, ...]) -> list[int]:
    """One cell of each method but the blend: that at equal weights, if there is one."""
    found: dict[str, int] = {}
    for index, cell in enumerate(cells):
        if cell.method in (BASE, ADAPTER, ORACLE, "mpa") or cell.kl_lambda != 1:
            continue
        if cell.method not in found or cell.weights == equal:
            found[cell.method] = index
    return list(found.values())


def _retrained(weights: tuple[float, ...], retrained: Mapping[tuple[float, ...], int]) -> int | None:
    """The retrained model for these weights, which may differ by rounding."""
    for others, index in retrained.items():
        if all(abs(one - other) < 1e-6 for one, other in zip(weights, others, strict=True)):
            return index
    return None


def _even(cell: Cell) -> bool:
    weights = [cell.weights[index] for index in cell.active]
    return max(weights) - min(weights) < 1e-6


def _same(cell: Cell, weights: tuple[float, ...], method: str) -> bool:
    return cell.method == method and cell.weights == weights


def grid_png(
    pictures: Mapping[tuple[int, int], Pixels], labels: Mapping[int, str], prompts: Mapping[int, str]
) -> bytes:
    """Pictures keyed (cell, prompt) as one PNG; `labels` gives the rows top down, `prompts` the columns."""
    font, bold = _font("DejaVuSans.ttf", 14), _font("DejaVuSans-Bold.ttf", 14)
    heads = {prompt: _wrap(text, font, TILE - 4) for prompt, text in prompts.items()}
    top = MARGIN + 19 * max(len(lines) for lines in heads.values()) + GAP
    first = next(iter(pictures.values()))
    height = round(TILE * first.shape[0] / first.shape[1])
    size = (
        MARGIN + LABEL_WIDTH + len(prompts) * (TILE + GAP) + MARGIN - GAP,
        top + len(labels) * (height + GAP) + MARGIN - GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (prompt, lines) in enumerate(heads.items()):
        left = MARGIN + LABEL_WIDTH + column * (TILE + GAP)
        for line, text in enumerate(lines):
            draw.text((left + 2, top - GAP - 19 * (len(lines) - line)), text, font=font, fill=INK)
        for row, cell in enumerate(labels):
            tile = Image.fromarray(pictures[cell, prompt]).resize((TILE, height), Image.Resampling.LANCZOS)
            upper = top + row * (height + GAP)
            # a white picture on white paper needs an edge
            draw.rectangle((left - 1, upper - 1, left + TILE, upper + height), outline=LINE)
            sheet.paste(tile, (left, upper))
    for row, label in enumerate(labels.values()):
        lines = [part for piece in label.split(" · ") for part in _wrap(piece, bold, LABEL_WIDTH - 14)]
        start = top + row * (height + GAP) + (height - 19 * len(lines)) // 2
        for line, text in enumerate(lines):
            draw.text(
                (MARGIN, start + 19 * line), text, font=bold if line == 0 else font, fill=INK if line == 0 else MUTED
            )
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(pixels: Pixels) -> str:
    """A picture inside HTML, no larger than a thumbnail: as PNG, or as a fine JPEG where that is smaller."""
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_THUMBNAIL, LARGEST_THUMBNAIL), Image.Resampling.LANCZOS)
    exact, fine = io.BytesIO(), io.BytesIO()
    image.save(exact, format="PNG", optimize=True)
    # colours at full resolution: they are what is judged
    image.save(fine, format="JPEG", quality=92, subsampling=0)
    if fine.tell() < exact.tell():
        return f"data:image/jpeg;base64,{base64.b64encode(fine.getvalue()).decode()}"
    return png_uri(exact.getvalue())


def png_uri(data: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """matplotlib brings DejaVu along, so the picture looks alike on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 4) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return lines
