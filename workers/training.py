"""fit_basis: train one basis adapter with Ray Train, or in this process when `num_workers` is 0."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from blend.finetune.checkpoint import Checkpoints, read_state
from blend.finetune.config import TrainConfig, require_resumable
from blend.finetune.errors import ConfigError, ResumeError
from blend.finetune.held_out import Metrics
from blend.finetune.loop import run_training
from blend.finetune.prompts import load_prompts
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import Workgroup
from blend.model import load_model, model_hash
from blend.rewards import MovableReward, Reward, RewardError, load_reward
from blend.rewards.weighted import WeightedReward
from infra.settings import read_settings
from workers.bundles import resolve_base
from workers.checkpoints import checkpoint_location, open_checkpoints
from workers.training_log import ProgressLog
from workers.training_result import FitResult, write_result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainJob(BaseModel):
    """What every worker gets: settings and prompts, so that prompt files are needed on the driver alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: TrainConfig
    prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    base_hash: str

    @classmethod
    def prepare(cls, config: TrainConfig) -> "TrainJob":
        """Check everything a run needs before any work.

        Raises ConfigError, RewardError, BundleError (no such base model) or ModelError (one that is not whole).
        """
        _require_rewards(config)
        prompts = load_prompts(config.prompts, key="prompts")
        held_out = load_prompts(config.held_out_prompts, key="held_out_prompts")
        if shared := sorted(set(prompts) & set(held_out)):
            raise ConfigError(
                f"held_out_prompts share {len(shared)} prompts with prompts, first {shared[0]!r}: remove them"
            )
        base_hash = model_hash(resolve_base(config.base_model))
        return cls(config=config, prompts=prompts, held_out_prompts=held_out, base_hash=base_hash)

    @property
    def digest(self) -> str:
        """16 hex digits that change with anything that decides the result: settings, prompts, base, reward, version."""
        facts = [
            self.config.digest,
            self.prompts,
            self.held_out_prompts,
            self.base_hash,
            [load_reward(name).version for name in (*self.config.rewards, *sorted(self.config.guard.watch))],
            version("diffusion-blend"),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def run(self) -> str:
        """What this run is called wherever its checkpoints are kept: name and digest."""
        return f"{self.config.name}-{self.digest}"

    def trainer(
        self, device: str = "cpu", workgroup: Workgroup | None = None, rewards: Mapping[str, Reward] | None = None
    ) -> Trainer:
        """A fresh trainer of this job on a device; rewards not given by name are computed in this process."""
        given = rewards or {}
        named = {
            name: given.get(name) or load_reward(name) for name in (*self.config.rewards, *self.config.guard.watch)
        }
        model = load_model(resolve_base(self.config.base_model), device=device, dtype=DTYPES[self.config.dtype])
        return Trainer(
            self.config,
            model,
            trained_reward(self.config, named),
            self.prompts,
            self.held_out_prompts,
            workgroup,
            base_hash=self.base_hash,
            watched={name: named[name] for name in self.config.guard.watch},
        )


def trained_reward(config: TrainConfig, rewards: Mapping[str, Reward]) -> Reward:
    """The reward of a run from its parts; a mix gets its scales from the trainer, which measures the base first."""
    if isinstance(config.reward, str):
        return rewards[config.reward]
    return WeightedReward(rewards, config.reward, dict.fromkeys(config.reward, (0.0, 1.0)))


def _require_rewards(config: TrainConfig) -> None:
    """Raise ConfigError that names the key of an unknown reward, or GPUs that no reward would use."""
    movable = False
    for key, name in (
        *(("reward is", name) for name in config.rewards),
        *(("guard.watch has", name) for name in config.guard.watch),
    ):
        try:
            movable |= isinstance(load_reward(name), MovableReward)
        except RewardError as error:
            raise ConfigError(f"{key} {name!r}: {error}") from None
    if config.reward_actors and config.reward_gpus and not movable:
        raise ConfigError(
            f"reward_gpus is {config.reward_gpus:g}: {config.reward_label!r} is computed on the CPU and leaves them "
            "idle; set it to 0"
        )


def fit_basis(
    config: TrainConfig,
    *,
    output_dir: str | Path,
    storage_path: str | Path | None = None,
    on_progress: Callable[[Metrics], None] | None = None,
    show_bar: bool = True,
) -> FitResult:
    """Train, then write the adapter's directory; called again with the same arguments it resumes or returns.

    storage_path, a directory or a store's URL, holds the checkpoints (default: output_dir/checkpoints, or with the
    registry when the settings' store is in S3); when there are several nodes, it must be visible to all of them.
    on_progress runs in the calling thread with each iteration's metrics.
    """
    output_dir = Path(output_dir).resolve()
    job = TrainJob.prepare(config)
    location = str(storage_path or checkpoint_location(job.run, output_dir))
    if "://" not in location:
        location = str(Path(location).expanduser().resolve())
    open_here = partial(open_checkpoints, location, output_dir / "checkpoints", read_settings())
    checkpoints = open_here()
    output_dir.mkdir(parents=True, exist_ok=True)
    with ProgressLog(config, output_dir / "metrics.jsonl", on_progress, show_bar) as log:
        if config.num_workers == 0:
            checkpoint = fit_in_process(job, checkpoints, log)
        else:
            from workers.training_ray import fit_on_ray

            checkpoint = fit_on_ray(job, open_here, log)
    return write_result(job, checkpoint, output_dir)


def fit_in_process(
    job: TrainJob,
    checkpoints: Checkpoints,
    on_metrics: Callable[[Metrics], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train here, from the newest checkpoint if there is one; returns the last checkpoint."""
    device = "cuda" if job.config.use_gpu else "cpu"
    if job.config.use_gpu and not torch.cuda.is_available():
        raise ConfigError("use_gpu is true: this machine has no CUDA device; set it to false")
    latest, state = read_resumable(job, checkpoints)
    if latest and state and is_finished(state, job.config):
        return latest
    trainer = job.trainer(device)
    trainer.should_stop = should_stop
    if state is not None:
        resume(trainer, state)
    run_training(trainer, save=checkpoints.save, on_metrics=on_metrics, should_stop=should_stop)
    newest = checkpoints.latest()
    assert newest is not None
    return newest


def read_resumable(job: TrainJob, checkpoints: Checkpoints) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint and its state, if any; ResumeError names the settings in which it is another run's."""
    latest = checkpoints.latest()
    if latest is None:
        return None, None
    state = read_state(latest)
    require_resumable(job.config, state["settings"], job.base_hash)
    if state["iteration"] > job.config.iterations:
        raise ResumeError(
            f"the checkpoint of {job.config.name!r} is of iteration {state['iteration']} and iterations is "
            f"{job.config.iterations}: raise it, or train into another directory"
        )
    return latest, state


def is_finished(state: dict[str, Any], config: TrainConfig) -> bool:
    """Whether there is nothing left to train; a run that stopped early goes on only when `iterations` was raised."""
    if state["iteration"] >= config.iterations:
        return True
    return bool(state.get("finished")) and state["history"][-1]["iterations"] >= config.iterations


def resume(trainer: Trainer, state: dict[str, Any]) -> None:
    """Load a checkpoint's state; a run that stopped early goes on where `iterations` was raised since."""
    trainer.load_state_dict(state)
    trainer.finished = trainer.finished and is_finished(state, trainer.config)
