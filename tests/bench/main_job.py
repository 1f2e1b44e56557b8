"""The main job's figures: how well the base model draws, what each shipped adapter gains, how long the demo takes.

--skip-demo keeps the demo_seconds of the last run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, write_figures
from tqdm import tqdm

from blend.engine import Sample
from blend.preference import Preference
from blend.rewards import load_reward
from blend.sprites import base_model_path
from blend.sprites.captions import held_out_prompts
from blend.sprites.export import load_base, measure_base
from blend.sprites.judge import load_judge, measure_accuracy
from infra.settings import read_settings
from workers.bundles import load_engine, open_bundle
from workers.evaluation.pictures import grid_png

PROMPTS = 48
SEEDS = 4
PICTURED = ("colourfulness", "compressibility", "brightness")
PROMPTS_PICTURED = (
    "A red colored car.",
    "A blue colored cat.",
    "An orange bird and a purple umbrella.",
    "A green colored cup.",
    "A white boat and a red house.",
)


def measure_drawing() -> dict[str, Any]:
    """The judge on renders, and on the base model's samples."""
    judge = load_judge()
    samples = measure_base(load_base(base_model_path()), judge)
    return {
        "classifier_accuracy": measure_accuracy(judge)["all"],
        "colour_accuracy": samples["colour_accuracy"],
        "object_accuracy": samples["object_accuracy"],
        "pair_accuracy": samples["pair_accuracy"],
        "samples": samples,
    }


def measure_gains() -> dict[str, dict[str, float]]:
    """Reward of the base and of each adapter alone, on held-out prompts with the same seeds."""
    engine = load_engine(open_bundle(settings=read_settings()))
    prompts = [prompt for prompt in held_out_prompts(PROMPTS) for _ in range(SEEDS)]

    def images(weights: dict[str, float], kl_lambda: float) -> torch.Tensor:
        preference = Preference(weights=weights, kl_lambda=kl_lambda)
        samples = [Sample(prompt, preference, seed=index) for index, prompt in enumerate(prompts)]
        with tqdm(total=len(samples) * 20, desc=f"{weights} at lambda {kl_lambda:g}", unit="step") as bar:
            outputs = engine.run(samples, lambda done, total: bar.update(done - bar.n))
        return engine.decode([output.latents for output in outputs])

    basis = engine.bank.names
    base = images({basis[0]: 1.0}, 0.0)
    gains = {}
    for name in basis:
        reward = load_reward(name)
        before, after = reward(base, prompts), reward(images({name: 1.0}, 1.0), prompts)
        difference = after - before
        gains[name] = {
            "base_mean": float(before.mean()),
            "tuned_mean": float(after.mean()),
            "base_std": float(before.std()),
            "gain_ci95": float(1.96 * difference.std() / len(prompts) ** 0.5),
            "images": len(prompts),
        }
    return gains


def draw_preferences(path: Path) -> None:
    """The picture of what the dials do: one row per preference, the same prompts and seeds in each."""
    engine = load_engine(open_bundle(settings=read_settings()))
    first, second, third = PICTURED
    dials = {
        "base model": ({first: 1.0}, 0.0),
        **{f"{name} · alone": ({name: 1.0}, 1.0) for name in PICTURED},
        f"half and half · {first}, {second}": ({first: 0.5, second: 0.5}, 1.0),
        f"half and half · {first}, {third}": ({first: 0.5, third: 0.5}, 1.0),
        f"half and half · {second}, {third}": ({second: 0.5, third: 0.5}, 1.0),
        "a third each": (dict.fromkeys(PICTURED, 1 / 3), 1.0),
        f"{first} · lambda 0.5": ({first: 1.0}, 0.5),
        f"{first} · lambda 1.5": ({first: 1.0}, 1.5),
    }
    samples = [
        Sample(prompt, Preference(weights=weights, kl_lambda=kl_lambda), seed=column)
        for weights, kl_lambda in dials.values()
        for column, prompt in enumerate(PROMPTS_PICTURED)
    ]
    images = engine.decode([output.latents for output in engine.run(samples)])
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    places = [(row, column) for row in range(len(dials)) for column in range(len(PROMPTS_PICTURED))]
    pictures = dict(zip(places, pixels, strict=True))
    path.write_bytes(grid_png(pictures, dict(enumerate(dials)), dict(enumerate(PROMPTS_PICTURED))))


def time_demo() -> float:
    """Seconds of a demo in a directory of its own, from the command to its end."""
    script = Path(sys.executable).parent / "diffusion-blend"
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        subprocess.run(
            [str(script), "demo", "--no-stay", "--output-dir", directory], stdin=subprocess.DEVNULL, check=True
        )
        return time.monotonic() - began


def last_demo() -> float | None:
    path = RESULTS / "main_job.json"
    return json.loads(path.read_text())["figures"].get("demo_seconds") if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-demo", action="store_true")
    skip_demo = parser.parse_args().skip_demo
    torch.set_num_threads(1)
    figures = measure_drawing() | {"reward_gain": measure_gains()}
    figures["demo_seconds"] = last_demo() if skip_demo else round(time_demo(), 1)
    draw_preferences(RESULTS / "preferences.png")
    write_figures("main_job", figures)


if __name__ == "__main__":
    main()
