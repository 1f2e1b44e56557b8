"""Training runs of the benchmark: each in a directory of its own, gone on with or only read when it is there."""

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blend.finetune.config import TrainConfig
from blend.finetune.held_out import Metrics
from workers.training import TrainJob, fit_basis

RUN_FILES = Path(__file__).parents[3] / "infra" / "runs"


def run_config(basis: str, seed: int, **changes: Any) -> TrainConfig:
    """The settings of infra/runs/train_<basis>.toml in one process, with a seed and other changes."""
    config = TrainConfig.from_toml(RUN_FILES / f"train_{basis}.toml")
    changes = {"seed": seed, "num_workers": 0, **changes}
    return TrainConfig.parse({**config.model_dump(), **changes}, source=f"train_{basis}.toml")


@dataclass(frozen=True, slots=True)
class Run:
    """A run and where it lies."""

    config: TrainConfig
    directory: Path

    @classmethod
    def of(cls, config: TrainConfig, work: Path) -> "Run":
        """A directory named by all that decides the result but the code: after changing that, take another `work`."""
        name = f"{config.name}-{config.objective}-seed{config.seed}-{TrainJob.prepare(config).digest}"
        return cls(config, work / name)

    def __str__(self) -> str:
        return f"{self.config.name}, {self.config.objective}, seed {self.config.seed}"


def train(run: Run) -> list[Metrics]:
    """Train to the end, from the newest checkpoint if there is one; the history, iteration 0 being the base."""
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()

    def say(metrics: Metrics) -> None:
        if "held_out_mean" in metrics:
            print(
                f"{time.strftime('%H:%M:%S')} {run}: iteration {metrics['iteration']} of {run.config.iterations}, held "
                f"out {metrics['held_out_mean']:.3f}, path KL {metrics['held_out_path_kl']:.0f} nats, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )

    storage = run.directory / "checkpoints"
    return fit_basis(
        run.config, output_dir=run.directory, storage_path=storage, on_progress=say, show_bar=False
    ).metrics


def train_all(runs: Iterable[Run], jobs: int) -> dict[Path, Sequence[Metrics]]:
    """Histories by directory, `jobs` processes at a time; a failure is raised once the runs under way have ended."""
    wanted = list({run.directory: run for run in runs}.values())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(train, run): run for run in wanted}
        found = {}
        try:
            for done in as_completed(waiting):
                found[waiting[done].directory] = done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found
