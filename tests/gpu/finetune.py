"""Fine-tuning of a Stable Diffusion architecture with random weights: images per GPU-hour, and peak memory.

    PYTHONPATH=. python tests/gpu/finetune.py --size sd15 --dtype float16
    PYTHONPATH=. torchrun --nproc-per-node 8 tests/gpu/finetune.py --size sd15 --dtype float16    # scaling
One iteration is rollout, reward and update, as `diffusion-blend train` runs it; the first warms up and is not counted.
Prints a JSON line per case and a section for RESULTS.md. Several GPUs share the same global batch times their number.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import peak_bytes, reset_peak, wait
from random_models import save_pipeline
from torch import distributed as dist

from blend.finetune.config import TrainConfig
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import TorchWorkgroup, Workgroup
from blend.model import load_model
from blend.rewards import load_reward

PIXELS = {"sd15": 512, "sdxl": 1024, "tiny": 64}
PROMPTS = tuple(f"A picture of object number {number}." for number in range(8))
# {images per GPU-hour, bytes}: 4,500 on an H100; a public DDPO trainer makes about 800 on an A100
TARGET_IMAGES, TARGET_BYTES = 4500, 16e9
CASES: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 20, "guidance_scale": 1.0, "micro_batch_rows": 8},
    {"num_inference_steps": 20, "guidance_scale": 7.5, "micro_batch_rows": 8},
    {"num_inference_steps": 50, "guidance_scale": 7.5, "micro_batch_rows": 8},
    {"num_inference_steps": 20, "guidance_scale": 7.5, "micro_batch_rows": 16},
    {"num_inference_steps": 20, "guidance_scale": 7.5, "micro_batch_rows": 16, "gradient_checkpointing": True},
)


def run(base: Path, case: dict[str, Any], device: str, workgroup: Workgroup, options: Any) -> dict[str, Any]:
    """Median over iterations of one case; every GPU makes `options.images` images of an iteration."""
    prompts = 4 * workgroup.size
    settings = {
        "name": "measured",
        "base_model": str(base),
        "reward": "brightness",
        "prompts": PROMPTS,
        "held_out_prompts": ("A picture of nothing.",),
        "held_out_images": 2 * workgroup.size,
        "prompts_per_iteration": prompts,
        "images_per_prompt": options.images // 4,
        "train_steps_per_sample": 5,
        "eval_guidance_scale": case["guidance_scale"],
        **case,
    }
    config = TrainConfig.parse({**settings, "num_inference_steps": options.steps or case["num_inference_steps"]})
    model = load_model(base, device=device, dtype=getattr(torch, options.dtype))
    reset_peak(model.device)
    trainer = Trainer(
        config, model, load_reward("brightness"), PROMPTS, config.held_out_prompts, workgroup, base_hash=None
    )
    trainer.evaluate()
    trainer.iterate()
    taken, rollouts = [], []
    for _ in range(options.iterations):
        wait(model.device)
        metrics = trainer.iterate()
        wait(model.device)
        taken.append(metrics["seconds"])
        rollouts.append(metrics["rollout_seconds"])
    seconds = sorted(taken)[len(taken) // 2]
    return {
        "size": options.size,
        "dtype": options.dtype,
        **case,
        "num_inference_steps": config.num_inference_steps,
        "gpus": workgroup.size,
        "images": config.batch_size,
        "trained_steps": config.train_steps_per_sample,
        "images_per_gpu_hour": 3600 * config.batch_size / seconds / workgroup.size,
        "rollout_share": sum(rollouts) / sum(taken),
        "ratio_deviation": metrics["ratio_deviation"],
        "peak_bytes": peak_bytes(model.device),
    }


def section(lines: Sequence[dict[str, Any]], device: str) -> str:
    """What goes into RESULTS.md."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    table = [
        f"## Fine-tuning, {lines[0]['size']} in {lines[0]['dtype']}, {lines[0]['gpus']} x {name}",
        "",
        "| steps | guidance | rows of a training forward | checkpointing | images per GPU-hour | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        table.append(
            f"| {line['num_inference_steps']} | {line['guidance_scale']:g} | {line['micro_batch_rows']} "
            f"| {'yes' if line.get('gradient_checkpointing') else 'no'} | {line['images_per_gpu_hour']:.0f} "
            f"| {line['peak_bytes'] / 1e9:.1f} GB |"
        )
    best, least = max(line["images_per_gpu_hour"] for line in lines), min(line["peak_bytes"] for line in lines)
    if lines[0]["size"] == "sd15" and device.startswith("cuda"):
        table += [
            "",
            f"{TARGET_IMAGES} images per GPU-hour: {'met' if best >= TARGET_IMAGES else 'not met'} ({best:.0f}).",
            f"Less than 16 GB: {'met' if least < TARGET_BYTES else 'not met'} ({least / 1e9:.1f} GB).",
        ]
    return "\n".join(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(PIXELS), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--images", type=int, default=16, help="of one iteration on each GPU; a multiple of 4")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--steps", type=int, help="inference steps of every case, for a short look")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="which of the cases")
    options = parser.parse_args(arguments)
    workgroup, device = Workgroup(), options.device
    if "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        workgroup = TorchWorkgroup(device)
    with tempfile.TemporaryDirectory() as directory:
        base = save_pipeline(options.size, PIXELS[options.size], Path(directory) / "base", torch.float16)
        lines = []
        for number in options.cases:
            lines.append(run(base, CASES[number], device, workgroup, options))
            if workgroup.rank == 0:
                print(json.dumps(lines[-1]), flush=True)
    if workgroup.rank == 0:
        print(section(lines, device))


if __name__ == "__main__":
    main()
