"""The sample sheet: the held-out images of every evaluation, the same prompts and seeds in each row."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blend.finetune.config import TrainConfig
from blend.finetune.held_out import Metrics
from blend.finetune.rollout import plan_held_out

MARGIN = 4
CELL = 128  # pixels of an image's side: small ones are enlarged by whole factors, large ones reduced
LABEL_WIDTH = 180
LABEL_SIZE = 12
LINE_HEIGHT = 16
TITLE_SIZE = 10
TITLE_HEIGHT = 13
TITLE_CHARACTER = 6  # pixels of an average one
TITLE_LINES = 3
# a long run's sheet shows the base, the last row, the published one and some between
MAX_ROWS = 12


def draw_sheet(
    sheets: Mapping[int, Tensor],
    history: Sequence[Metrics],
    path: Path,
    *,
    kept: int | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Write `sheet_of` the rows that `choose_rows` takes."""
    sheet_of(choose_rows(sheets, kept), history, kept=kept, prompts=prompts).save(path, optimize=True)


def sheet_prompts(config: TrainConfig, held_out_prompts: Sequence[str]) -> list[str]:
    """The prompt of each column: an evaluation keeps the first image of its first prompts."""
    plan = plan_held_out(config, held_out_prompts)
    return [one.prompt for place, one in enumerate(plan) if place == 0 or plan[place - 1].group != one.group]


def choose_rows(sheets: Mapping[int, Tensor], kept: int | None = None, most: int = MAX_ROWS) -> dict[int, Tensor]:
    """At most `most` rows, evenly spread from first to last; that of iteration `kept` among them."""
    order = sorted(sheets)
    if len(order) > most:
        spread = {order[round(i * (len(order) - 1) / (most - 1))] for i in range(most)}
        if kept in sheets and kept not in spread:
            between = sorted(spread - {order[0], order[-1]}, key=lambda at: abs(at - (kept or 0)))
            spread = (spread - {between[0]}) | {kept}
        order = sorted(at for at in spread if at is not None)
    return {at: sheets[at] for at in order}


def sheet_of(
    sheets: Mapping[int, Tensor], history: Sequence[Metrics], *, kept: int | None = None, prompts: Sequence[str] = ()
) -> Image.Image:
    """One row per evaluation, {iteration: uint8 [N, 3, H, W]}, base first; figures on the left, prompts above."""
    lines = {metrics["iteration"]: metrics for metrics in history}
    rows = [(row_label(at, lines.get(at), at == kept), row_pixels(images)) for at, images in sheets.items()]
    columns = len(next(iter(sheets.values())))
    cell = rows[0][1].shape[1] // columns
    titles = [wrap(prompt, cell // TITLE_CHARACTER)[:TITLE_LINES] for prompt in prompts[:columns]]
    top = MARGIN + TITLE_HEIGHT * max((len(title) for title in titles), default=0)
    sheet = Image.new("RGB", (LABEL_WIDTH + cell * columns, top + sum(pixels.shape[0] for _, pixels in rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        for number, text in enumerate(title):
            corner = LABEL_WIDTH + column * cell, MARGIN // 2 + number * TITLE_HEIGHT
            pen.text(corner, text, fill="black", font=_font(TITLE_SIZE))
    for label, pixels in rows:
        for number, text in enumerate(label):
            pen.text(
                (2 * MARGIN, top + number * LINE_HEIGHT), text, fill="black", font=_font(LABEL_SIZE, bold=number == 0)
            )
        sheet.paste(Image.fromarray(pixels.numpy()), (LABEL_WIDTH, top))
        top += pixels.shape[0]
    return sheet


def row_label(iteration: int, metrics: Metrics | None, kept: bool = False) -> list[str]:
    """The lines beside a row: which adapter, its held-out reward, path KL and diversity."""
    label = ["base" if iteration == 0 else f"iteration {iteration}"]
    if metrics is not None and "held_out_mean" in metrics:
        label.append(f"reward {metrics['held_out_mean']:.3f} ± {metrics['held_out_ci']:.3f}")
        if iteration:
            label.append(f"KL {metrics['held_out_path_kl']:.1f} nats")
        if metrics.get("held_out_diversity") is not None:
            label.append(f"diversity {metrics['held_out_diversity']:.3f}")
    if kept:
        label.append("published")
    return label


def row_pixels(images: Tensor) -> Tensor:
    """Images uint8 [N, 3, H, W] side by side, brought to about CELL pixels: uint8 [h, w, 3] on white."""
    height, width = images.shape[-2:]
    if width <= CELL:
        scale = CELL // width
        cells = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    else:
        size = (round(height * CELL / width), CELL)
        smooth = torch.nn.functional.interpolate(images.float(), size=size, mode="area")
        cells = smooth.round().to(torch.uint8)
    padded = torch.nn.functional.pad(cells, (0, MARGIN, 0, MARGIN), value=255)
    return torch.cat(list(padded.permute(0, 2, 3, 1)), dim=1).contiguous()


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)
