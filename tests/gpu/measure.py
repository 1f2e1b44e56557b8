"""What is measured on a device: rows and images per second, equality of rows, memory, and where the time goes."""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_models import Rows, random_rows
from torch import Tensor

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.model import load_model
from blend.preference import Preference
from blend.text_kv import TextKV
from blend.tiles import TileOptions, Tiles


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of three rounds of `repeats` calls, after two to warm up."""
    for _ in range(2):
        call()
    rounds = []
    for _ in range(3):
        wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        wait(device)
        rounds.append((time.perf_counter() - began) / repeats)
    return sorted(rounds)[1]


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most memory the device held since reset_peak; on a CPU, most memory the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def text_of(bank: AdapterBank, rows: Rows) -> TextKV:
    return bank.encode_text(rows.text)


def run_tile(tiles: Tiles, rows: Rows, text: TextKV) -> Tensor:
    index = torch.arange(len(rows.mix))
    return tiles.run(rows.latents, rows.timesteps, rows.text, rows.mix, text, index, rows.added)


@torch.inference_mode()
def naive_seconds(unet: Any, size: str, adapters: int, repeats: int) -> float:
    """One step of one image as the paper's code takes it: K guided forwards of 2 rows, one after another."""
    rows = random_rows(unet, size, 2, adapters)

    def step() -> None:
        for _ in range(adapters):
            unet(
                rows.latents,
                rows.timesteps,
                encoder_hidden_states=rows.text,
                added_cond_kwargs=rows.added or None,
                return_dict=False,
            )

    return seconds(step, unet.device, repeats)


@torch.inference_mode()
def rows_per_second(
    tiles: Tiles, size: str, adapters: int, counts: Sequence[int], repeats: int
) -> list[dict[str, float]]:
    """Rows per second and peak memory of tiles of each size."""
    unet, found = tiles.bank.unet, []
    for count in counts:
        rows = random_rows(unet, size, count, adapters)
        text = text_of(tiles.bank, rows)
        reset_peak(unet.device)
        taken = seconds(lambda rows=rows, text=text: run_tile(tiles, rows, text), unet.device, repeats)
        found.append({"rows": count, "rows_per_s": count / taken, "ms": 1000 * taken, "bytes": peak_bytes(unet.device)})
    return found


@torch.inference_mode()
def compare_neighbours(tiles: Tiles, size: str, adapters: int, count: int) -> dict[str, Any]:
    """Whether rows keep their bits at other places and among other rows of a tile; how far they are from alone."""
    unet = tiles.bank.unet
    rows, others = (random_rows(unet, size, count, adapters, seed) for seed in (1, 2))
    together = run_tile(tiles, rows, text_of(tiles.bank, rows))
    turned = torch.arange(count).roll(1)
    moved = run_tile(tiles, rows.take(turned), text_of(tiles.bank, rows.take(turned)))
    company = Rows(
        torch.cat([rows.latents[:1], others.latents[1:]]),
        torch.cat([rows.timesteps[:1], others.timesteps[1:]]),
        torch.cat([rows.text[:1], others.text[1:]]),
        {name: torch.cat([value[:1], others.added[name][1:]]) for name, value in rows.added.items()},
        torch.cat([rows.mix[:1], others.mix[1:].roll(1, 1)]),
    )
    first = run_tile(tiles, company, text_of(tiles.bank, company))[:1]
    alone = rows.take(torch.tensor([0]))
    eager = tiles.bank.forward(
        alone.latents, alone.timesteps, alone.text, alone.mix, added_cond_kwargs=alone.added
    ).float()
    return {
        "rows": count,
        "same_bits_elsewhere": torch.equal(moved, together[turned.to(together.device)]),
        "same_bits_in_other_company": torch.equal(first, together[:1]),
        "deviation_from_alone": float((together[:1].float() - eager).abs().max() / eager.abs().max()),
    }


def images_per_second(
    directory: Path,
    bank_of: Callable[[Any], AdapterBank],
    options: TileOptions,
    preference: dict[str, Any],
    **knobs: Any,
) -> dict[str, float]:
    """Images per second of one engine over `images` samples, decoding included; rows per image."""
    images, steps = knobs["images"], knobs["steps"]
    model = load_model(directory, device=knobs["device"], dtype=knobs["dtype"])
    bank = bank_of(model.unet)
    engine = BlendEngine(model, bank, max_rows=knobs["rows"], tile_rows=knobs["rows"], tiles=options)
    wanted = Preference(weights={name: 1 / len(bank.names) for name in bank.names}, **preference)
    samples = [Sample(f"a picture, number {i}", wanted, i, num_inference_steps=steps) for i in range(images)]

    def run() -> int:
        outputs = engine.run(samples)
        for output in outputs:
            if output.latents is None:
                raise output.error or RuntimeError("a sample ended without latents")
            engine.decode([output.latents])
        return sum(output.rows for output in outputs)

    run()  # compiles and captures
    reset_peak(model.device)
    wait(model.device)
    began = time.perf_counter()
    rows = run()
    wait(model.device)
    taken = time.perf_counter() - began
    return {
        "images_per_s": images / taken,
        "rows_per_image": rows / images,
        "rows_per_s": rows / taken,
        "bytes": peak_bytes(model.device),
    }


@torch.inference_mode()
def profile(tiles: Tiles, size: str, adapters: int, count: int, top: int = 12) -> list[dict[str, Any]]:
    """The operations that take the most time of their own in one tile, with their shares."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    unet = tiles.bank.unet
    rows = random_rows(unet, size, count, adapters)
    text = text_of(tiles.bank, rows)
    run_tile(tiles, rows, text)
    on_gpu = unet.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with record(activities=activities) as recorded:
        run_tile(tiles, rows, text)
        wait(unet.device)
    own = [
        (entry.key, entry.self_device_time_total if on_gpu else entry.self_cpu_time_total)
        for entry in recorded.key_averages()
        # on a GPU the kernels themselves: the operations that launch them count the same time again
        if not on_gpu or "CUDA" in str(entry.device_type)
    ]
    total = sum(taken for _, taken in own) or 1.0
    own.sort(key=lambda pair: -pair[1])
    return [{"operation": name[:80], "ms": taken / 1000, "share": taken / total} for name, taken in own[:top]]
