"""A run on two Ray workers whose workers are killed at random moments, against the same run left alone."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from blend.finetune.checkpoint import ADAPTER_FILE
from blend.finetune.config import TrainConfig
from workers.cluster import ray_session
from workers.training import FitResult, fit_basis

CLOCK = {"seconds", "rollout_seconds", "images_per_second"}
# enough for a run that goes on for a while after each kill was announced
ITERATIONS_PER_KILL = 4
LONGEST_DELAY = 0.5
SETTINGS: dict[str, Any] = {
    "name": "killed",
    "reward": "colourfulness",
    "prompts": ("A red colored car.", "A blue colored cup.", "A green colored bird."),
    "held_out_prompts": ("A red colored cup.", "A green colored car."),
    "held_out_images": 4,
    "objective": "dpok",
    "rank": 2,
    "prompts_per_iteration": 2,
    "images_per_prompt": 2,
    "updates_per_iteration": 2,
    "num_inference_steps": 3,
    "train_steps_per_sample": 2,
    "learning_rate": 1e-2,
    "num_workers": 2,
}


class Killer:
    """Sends SIGKILL to one of this process's Ray Train workers, a random while after each announced iteration."""

    def __init__(self, kills: int, seed: int) -> None:
        self.left = kills
        self.pids: list[int] = []
        self._random = random.Random(seed)
        self._thread: threading.Thread | None = None

    def __call__(self, metrics: dict[str, Any]) -> None:
        if self.left and not (self._thread and self._thread.is_alive()):
            delay, rank = self._random.uniform(0, LONGEST_DELAY), self._random.random()
            self._thread = threading.Thread(target=self._kill, args=(delay, rank), daemon=True)
            self._thread.start()

    def _kill(self, delay: float, rank: float) -> None:
        time.sleep(delay)
        workers = [pid for pid in find_workers() if pid not in self.pids]
        if workers:
            victim = workers[int(rank * len(workers))]
            psutil.Process(victim).kill()
            self.pids.append(victim)
            self.left -= 1


def find_workers() -> list[int]:
    """Process ids of the Ray Train workers below this process, which started their cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def kill_rounds(kills: int, directory: Path, *, base_model: str = "sprites", seed: int = 0) -> dict[str, Any]:
    """Train twice, undisturbed and with `kills` kills; {"kills": those done, "equal": bit for bit, "seconds": ...}.

    Equal means the same adapter, each iteration once in the history and the same metrics but for the clock.
    """
    settings = {**SETTINGS, "base_model": base_model, "iterations": max(2, ITERATIONS_PER_KILL * kills)}
    config = TrainConfig.parse(settings)
    killer, announced = Killer(kills, seed), []

    def show(metrics: dict[str, Any]) -> None:
        announced.append(metrics["iteration"])
        killer(metrics)

    with ray_session(num_cpus=2):
        whole = fit_basis(config, output_dir=directory / "whole", show_bar=False)
        started = time.monotonic()
        killed = fit_basis(config, output_dir=directory / "killed", on_progress=show, show_bar=False)
    equal = same(whole, killed) and announced == list(range(config.iterations + 1))
    return {"kills": len(killer.pids), "equal": equal, "seconds": time.monotonic() - started}


def same(one: FitResult, other: FitResult) -> bool:
    """Whether two runs are one, bit for bit."""
    weights = [load_file(result.adapter_dir / ADAPTER_FILE) for result in (one, other)]
    lines = [[{k: v for k, v in line.items() if k not in CLOCK} for line in r.metrics] for r in (one, other)]
    return (
        lines[0] == lines[1]
        and weights[0].keys() == weights[1].keys()
        and all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    )
