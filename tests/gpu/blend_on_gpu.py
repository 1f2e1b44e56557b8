"""Speed, memory and equality of blended tiles on the Stable Diffusion 1.5 or SDXL architecture with random weights.

Needs torch, diffusers, peft and transformers alone (no cluster, no download):
    PYTHONPATH=. python tests/gpu/blend_on_gpu.py --size sd15 --dtype float16
Prints JSON lines as it goes and ends with a table for RESULTS.md. Without a GPU, --size tiny shows that it runs.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from measure import (
    compare_neighbours,
    images_per_second,
    naive_seconds,
    profile,
    rows_per_second,
)
from random_models import SHAPES, random_bank, random_unet, save_pipeline

from blend.preference import METHODS
from blend.tiles import TileOptions, Tiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COUNTS = (2, 6, 12, 24, 48)
MODES = {
    "eager": TileOptions(channels_last=True),
    "graphed": TileOptions(channels_last=True, graphs=True, sizes=COUNTS),
    "compiled": TileOptions(channels_last=True, compile=True, sizes=COUNTS),
    "compiled+graphed": TileOptions(channels_last=True, compile=True, graphs=True, sizes=COUNTS),
}
DEVIATION = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
TARGETS = {2: 209.0, 12: 350.0, 24: 493.0, 48: 493.0}  # rows/s on one H100, SD 1.5, 512 px
TARGET_RATIO = 4.0  # images per second against K sequential guided forwards, K = 3
ADAPTERS = 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SHAPES), default="sd15")
    parser.add_argument("--pixels", type=int, help="side of the images; 512, 1024 for sdxl, 64 for the tiny ones")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16" if cuda else "float32")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), help="default: all on a GPU, eager on a CPU")
    parser.add_argument("--rows", nargs="+", type=int, choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--images", type=int, default=8, help="samples per engine run; 0 leaves the engine out")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    options.pixels = options.pixels or {"sd15": 512, "sdxl": 1024}.get(options.size, 64)
    options.modes = options.modes or (list(MODES) if options.device.startswith("cuda") else ["eager"])
    return options


def say(kind: str, **facts: Any) -> dict[str, Any]:
    line = {"kind": kind, **{k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}}
    print(json.dumps(line), flush=True)
    return line


def measure_tiles(options: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Rows per second, equality and profile of every mode; seconds of a naive step."""
    lines = []
    # eager in the layout diffusers loads, before tiles change it
    unet = random_unet(options.size, options.pixels, options.device, DTYPES[options.dtype])
    naive = naive_seconds(unet, options.size, ADAPTERS, options.repeats)
    lines.append(say("naive", adapters=ADAPTERS, ms_per_step=1000 * naive, rows_per_s=2 * ADAPTERS / naive))
    bank = random_bank(unet, ADAPTERS)
    for mode in options.modes:
        tiles = Tiles(bank, MODES[mode])
        for found in rows_per_second(tiles, options.size, ADAPTERS, options.rows, options.repeats):
            lines.append(say("tile", mode=mode, **found))
        for count in options.rows:
            lines.append(say("neighbours", mode=mode, **compare_neighbours(tiles, options.size, ADAPTERS, count)))
        for entry in profile(tiles, options.size, ADAPTERS, max(options.rows)):
            lines.append(say("profile", mode=mode, rows=max(options.rows), **entry))
    return lines, naive


def measure_images(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second of the engine for K = 1 to 4 and every method."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = save_pipeline(options.size, options.pixels, Path(scratch) / "model", DTYPES[options.dtype])
        for adapters in (1, 2, 3, 4):
            for method in METHODS:
                found = images_per_second(
                    directory,
                    lambda unet, adapters=adapters: random_bank(unet, adapters),
                    MODES[options.modes[-1]],
                    {"method": method},
                    images=options.images,
                    steps=options.steps,
                    rows=max(options.rows),
                    device=options.device,
                    dtype=DTYPES[options.dtype],
                )
                lines.append(say("images", adapters=adapters, method=method, mode=options.modes[-1], **found))
    return lines


def judge(lines: list[dict[str, Any]], naive: float, aimed: bool) -> list[str]:
    """One line per target; `aimed` says whether this run is what the targets are about."""
    verdicts = []
    best: dict[int, float] = {}
    for line in lines:
        if line["kind"] == "tile":
            best[line["rows"]] = max(best.get(line["rows"], 0.0), line["rows_per_s"])
    for rows, target in TARGETS.items():
        if rows in best:
            verdicts.append(
                verdict(f"{rows} rows: {best[rows]:.1f} rows/s, target {target:g}", best[rows] >= target, aimed)
            )
    ratio = max(best.values()) * naive / (2 * ADAPTERS)
    text = f"K = {ADAPTERS}: {ratio:.2f} x naive eager at the best tile, target {TARGET_RATIO:g}"
    return [*verdicts, verdict(text, ratio >= TARGET_RATIO, aimed)]


def verdict(text: str, met: bool, aimed: bool) -> str:
    if not aimed:
        return f"{text}: no H100 at sd15 and 512 px, so neither met nor missed"
    return f"{text}: {'met' if met else 'not met'}"


def markdown(options: argparse.Namespace, lines: list[dict[str, Any]], verdicts: list[str], command: str) -> str:
    """A section for RESULTS.md."""
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    rows = [
        f"## {options.size}, {options.pixels} px, {options.dtype}: {name}",
        f"{datetime.now(UTC).date().isoformat()}, torch {torch.__version__}, `{command}`",
        "",
        "| mode | rows | rows/s | ms | peak GiB | same bits elsewhere, in other company | deviation from alone |",
        "|---|---|---|---|---|---|---|",
    ]
    equal = {(line["mode"], line["rows"]): line for line in lines if line["kind"] == "neighbours"}
    for line in lines:
        if line["kind"] == "tile":
            same = equal[line["mode"], line["rows"]]
            bits = ", ".join("yes" if same[k] else "no" for k in ("same_bits_elsewhere", "same_bits_in_other_company"))
            figures = f"{line['rows_per_s']:.1f} | {line['ms']:.1f} | {line['bytes'] / 2**30:.2f}"
            rows.append(
                f"| {line['mode']} | {line['rows']} | {figures} | {bits} | {same['deviation_from_alone']:.1e} |"
            )
    rows += ["", "| K | method | images/s | rows per image | rows/s | peak GiB |", "|---|---|---|---|---|---|"]
    for line in lines:
        if line["kind"] == "images":
            figures = f"{line['images_per_s']:.3f} | {line['rows_per_image']:.0f} | {line['rows_per_s']:.1f}"
            rows.append(f"| {line['adapters']} | {line['method']} | {figures} | {line['bytes'] / 2**30:.2f} |")
    rows += ["", "| mode | operation | ms | share |", "|---|---|---|---|"]
    for line in lines:
        if line["kind"] == "profile":
            rows.append(f"| {line['mode']} | {line['operation']} | {line['ms']:.2f} | {line['share']:.0%} |")
    return "\n".join([*rows, "", *(f"- {text}" for text in verdicts)])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.backends.cudnn.benchmark = True
    lines, naive = measure_tiles(options)
    if options.images:
        lines += measure_images(options)
    h100 = options.device.startswith("cuda") and "H100" in torch.cuda.get_device_name()
    verdicts = judge(lines, naive, h100 and options.size == "sd15" and options.pixels == 512)
    given = sys.argv[1:] if arguments is None else list(arguments)
    print(markdown(options, lines, verdicts, " ".join(["python tests/gpu/blend_on_gpu.py", *given])))
    worst = max(line["deviation_from_alone"] for line in lines if line["kind"] == "neighbours")
    if not worst <= DEVIATION[options.dtype]:
        raise SystemExit(f"a row deviates by {worst:.2e} from itself alone: more than {DEVIATION[options.dtype]:.0e}")


if __name__ == "__main__":
    main()
