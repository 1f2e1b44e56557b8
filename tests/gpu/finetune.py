"""Images per GPU-hour and memory of fine-tuning a random model: rollout, reward and update. Needs `blend` alone.

    PYTHONPATH=. python tests/gpu/finetune.py --size sd15 --dtype bfloat16
    PYTHONPATH=. torchrun --nproc-per-node 4 tests/gpu/finetune.py    # the same images per GPU on each
Micro-batches are compared at the first of --steps, with and without gradient checkpointing; the fastest goes on to the
other cases. Prints JSON lines and a section for RESULTS.md.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from measure import peak_bytes, reset_peak, wait
from random_models import SHAPES, save_pipeline
from torch import distributed as dist

from blend.finetune.config import TrainConfig
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import TorchWorkgroup, Workgroup
from blend.model import load_model
from blend.rewards import load_reward

PIXELS = {"tiny": 64, "tiny-xl": 64, "sd15": 512, "sdxl": 1024}
# SD 1.5, 512 px, rank 4, one H100; public ddpo-pytorch makes about 800 images per hour on an A100
TARGET_IMAGES_PER_HOUR, TARGET_GIB = 4500, 16
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "purple")
PROMPTS = tuple(f"A {colour} colored car." for colour in COLOURS)
HELD_OUT = ("A pink colored cup.", "A grey colored cup.")


@dataclass(frozen=True, slots=True)
class Case:
    """What is varied."""

    steps: int
    guidance_scale: float
    gradient_checkpointing: bool
    micro_batch_rows: int


class Rig:
    """Trains one case after another on this process's device."""

    def __init__(self, options: argparse.Namespace, directory: Path, device: str, workgroup: Workgroup) -> None:
        self.options, self.directory, self.device, self.workgroup = options, directory, torch.device(device), workgroup

    def measure(self, case: Case) -> dict[str, Any]:
        """Medians over iterations after one to warm up; `error` instead where memory ran out."""
        try:
            return self._measure(case)
        except torch.OutOfMemoryError as error:
            return {**asdict(case), "error": str(error).splitlines()[0]}
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, case: Case) -> dict[str, Any]:
        model = load_model(self.directory, device=self.device, dtype=getattr(torch, self.options.dtype))
        config = self.config(case)
        reward = load_reward(config.reward)
        trainer = Trainer(config, model, reward, PROMPTS, HELD_OUT, self.workgroup)
        trainer.evaluate()
        trainer.iterate()
        wait(self.device)
        reset_peak(self.device)
        lines = [trainer.iterate() for _ in range(self.options.iterations)]
        seconds = statistics.median(line["seconds"] for line in lines)
        rollout = statistics.median(line["rollout_seconds"] for line in lines)
        per_hour = 3600 * config.batch_size / seconds
        return {
            **asdict(case),
            "images": config.batch_size,
            "gpus": self.workgroup.size,
            "trained_steps": config.train_steps_per_sample,
            "seconds": seconds,
            "rollout_seconds": rollout,
            "images_per_hour": per_hour,
            "images_per_gpu_hour": per_hour / self.workgroup.size,
            "peak_gib": peak_bytes(self.device) / 2**30,
            # of replayed steps before an iteration's update: rounding in this dtype
            "ratio_deviation": max(line["ratio_deviation"] for line in lines),
        }

    def config(self, case: Case) -> TrainConfig:
        """A run of `images` images per GPU and iteration."""
        images = self.options.images * self.workgroup.size
        per_prompt = next(count for count in (4, 2) if images % count == 0)
        return TrainConfig.parse(
            {
                "name": "random",
                "base_model": str(self.directory),
                "reward": self.options.reward,
                "prompts": PROMPTS,
                "held_out_prompts": HELD_OUT,
                "held_out_images": 2 * self.workgroup.size,
                "rank": self.options.rank,
                "prompts_per_iteration": images // per_prompt,
                "images_per_prompt": per_prompt,
                "num_inference_steps": case.steps,
                "train_steps_per_sample": min(self.options.trained_steps, case.steps),
                "guidance_scale": case.guidance_scale,
                "eval_guidance_scale": case.guidance_scale,
                "micro_batch_rows": case.micro_batch_rows,
                "gradient_checkpointing": case.gradient_checkpointing,
                "learning_rate": 1e-5,
                "dtype": self.options.dtype,
            }
        )


def run(rig: Rig, say: Any) -> list[dict[str, Any]]:
    """The sweep of micro-batches, then every number of steps and guidance scale with the fastest."""
    options, lines = rig.options, []
    first = options.steps[0], options.guidance[0]
    sweep = [
        Case(*first, checkpointing, rows)
        for checkpointing, rows in itertools.product((False, True), options.micro_batch_rows)
    ]
    lines = [say(rig.measure(case)) for case in sweep]
    fitting = [line for line in lines if "error" not in line]
    if not fitting:
        return lines
    fastest = max(fitting, key=lambda line: line["images_per_hour"])
    chosen = fastest["gradient_checkpointing"], fastest["micro_batch_rows"]
    others = [pair for pair in itertools.product(options.steps, options.guidance) if pair != first]
    return lines + [say(rig.measure(Case(*pair, *chosen))) for pair in others]


def verdicts(lines: Sequence[dict[str, Any]], aimed: bool) -> list[str]:
    """Images per GPU-hour and memory of the fastest case of each number of steps and guidance."""
    found = []
    measured = [line for line in lines if "error" not in line]
    for steps, guidance in dict.fromkeys((line["steps"], line["guidance_scale"]) for line in measured):
        same = [line for line in measured if (line["steps"], line["guidance_scale"]) == (steps, guidance)]
        best = max(same, key=lambda line: line["images_per_gpu_hour"])
        rate, gib = best["images_per_gpu_hour"], best["peak_gib"]
        text = f"{steps} steps, guidance {guidance:g}: {rate:.0f} images per GPU-hour (target {TARGET_IMAGES_PER_HOUR})"
        text += f", {gib:.1f} GiB (target {TARGET_GIB})"
        if aimed:
            met = [
                word for word, good in (("speed", rate >= TARGET_IMAGES_PER_HOUR), ("memory", gib < TARGET_GIB)) if good
            ]
            found.append(f"{text}: met {' and '.join(met) or 'neither'}")
        else:
            found.append(f"{text}: no H100 at sd15 and 512 px, so neither met nor missed")
    return found


def markdown(options: argparse.Namespace, lines: Sequence[dict[str, Any]], device: str) -> str:
    """A section for RESULTS.md."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    gpus = next((line["gpus"] for line in lines if "gpus" in line), 1)
    rows = [
        f"## Fine-tuning {options.size}, {options.pixels} px, rank {options.rank}, {options.dtype}: {gpus} x {name}",
        f"{datetime.now(UTC).date().isoformat()}, torch {torch.__version__}, {options.images} images per GPU and "
        f"iteration, {options.trained_steps} steps of each trained, reward {options.reward}",
        "",
        "| steps | guidance | checkpointing | micro-batch rows | images per GPU-hour | rollout | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        settings = (
            f"| {line['steps']} | {line['guidance_scale']:g} | {'yes' if line['gradient_checkpointing'] else 'no'} "
        )
        settings += f"| {line['micro_batch_rows']} "
        if "error" in line:
            rows.append(f"{settings}| out of memory | | |")
        else:
            share = 100 * line["rollout_seconds"] / line["seconds"]
            rows.append(f"{settings}| {line['images_per_gpu_hour']:.0f} | {share:.0f} % | {line['peak_gib']:.1f} |")
    aimed = "H100" in name and (options.size, options.pixels) == ("sd15", 512)
    return "\n".join([*rows, "", *(f"- {text}" for text in verdicts(lines, aimed))])


@contextmanager
def process_group(device: str) -> Iterator[tuple[str, Workgroup]]:
    """This process's device and workgroup: alone, or one of torchrun's, each with a GPU of its own."""
    if "WORLD_SIZE" not in os.environ:
        yield device, Workgroup()
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device, TorchWorkgroup(device)
    finally:
        dist.destroy_process_group()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SHAPES), default="sd15")
    parser.add_argument("--pixels", type=int, help="default: the architecture's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--trained-steps", type=int, default=5, help="of each path")
    parser.add_argument("--guidance", nargs="+", type=float, default=[7.5, 1.0])
    parser.add_argument("--micro-batch-rows", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--images", type=int, default=32, help="per GPU and iteration, an even number")
    parser.add_argument("--iterations", type=int, default=2, help="measured, after one to warm up")
    parser.add_argument("--reward", default="colourfulness")
    options = parser.parse_args(arguments)
    if options.images < 2 or options.images % 2:
        parser.error(f"--images is {options.images}: use an even number, images of one prompt are compared")
    options.pixels = options.pixels or PIXELS[options.size]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        # every process draws its own from the same seed, and before the group exists: transformers would then save on
        # the first process alone
        directory = save_pipeline(options.size, options.pixels, Path(scratch) / "model", getattr(torch, options.dtype))
        with process_group(options.device) as (device, workgroup):

            def say(line: dict[str, Any]) -> dict[str, Any]:
                rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in line.items()}
                if workgroup.rank == 0:
                    print(json.dumps({"kind": "finetune", **rounded}), flush=True)
                return line

            lines = run(Rig(options, directory, device, workgroup), say)
            if workgroup.rank == 0:
                print(markdown(options, lines, device))


if __name__ == "__main__":
    main()
