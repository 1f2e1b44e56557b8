"""fit_basis: train one basis adapter with Ray Train, or in this process when `num_workers` is 0."""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from blend.finetune.checkpoint import CheckpointFolder, read_state
from blend.finetune.config import TrainConfig, require_resumable
from blend.finetune.errors import ConfigError
from blend.finetune.held_out import Metrics
from blend.finetune.loop import run_training
from blend.finetune.prompts import load_prompts
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import Workgroup
from blend.model import load_model, model_hash
from blend.rewards import MovableReward, Reward, RewardError, load_reward
from workers.bundles import resolve_base
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
        """Check everything a run needs before any work; ConfigError, ModelError or RewardError otherwise."""
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
            [load_reward(name).version for name in (self.config.reward, *sorted(self.config.guard.watch))],
            version("diffusion-blend"),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def trainer(
        self, device: str = "cpu", workgroup: Workgroup | None = None, rewards: Mapping[str, Reward] | None = None
    ) -> Trainer:
        """A fresh trainer of this job on a device; rewards not given by name are computed in this process."""
        rewards = rewards or {}
        model = load_model(resolve_base(self.config.base_model), device=device, dtype=DTYPES[self.config.dtype])
        return Trainer(
            self.config,
            model,
            rewards.get(self.config.reward) or load_reward(self.config.reward),
            self.prompts,
            self.held_out_prompts,
            workgroup,
            base_hash=self.base_hash,
            watched={name: rewards.get(name) or load_reward(name) for name in self.config.guard.watch},
        )


def _require_rewards(config: TrainConfig) -> None:
    """Raise ConfigError that names the key of an unknown reward, or GPUs that no reward would use."""
    movable = False
    for key, name in (("reward is", config.reward), *(("guard.watch has", name) for name in config.guard.watch)):
        try:
            movable |= isinstance(load_reward(name), MovableReward)
        except RewardError as error:
            raise ConfigError(f"{key} {name!r}: {error}") from None
    if config.reward_actors and config.reward_gpus and not movable:
        raise ConfigError(
            f"reward_gpus is {config.reward_gpus:g}: {config.reward!r} is computed on the CPU and leaves them idle; "
            "set it to 0"
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

    storage_path holds the checkpoints (default output_dir/checkpoints) and must be visible to all nodes when
    there are several. on_progress runs in the calling thread with each iteration's metrics.
    """
    output_dir = Path(output_dir).resolve()
    job = TrainJob.prepare(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    storage = Path(storage_path).resolve() if storage_path is not None else output_dir / "checkpoints"
    with ProgressLog(config, output_dir / "metrics.jsonl", on_progress, show_bar) as log:
        if config.num_workers == 0:
            checkpoint = fit_in_process(job, storage, log)
        else:
            from workers.training_ray import fit_on_ray

            checkpoint = fit_on_ray(job, storage, log)
    return write_result(job, checkpoint, output_dir)


def fit_in_process(
    job: TrainJob,
    storage: Path,
    on_metrics: Callable[[Metrics], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train here, from the newest checkpoint in `storage` if there is one; returns the last checkpoint."""
    folder = CheckpointFolder(storage)
    device = "cuda" if job.config.use_gpu else "cpu"
    if job.config.use_gpu and not torch.cuda.is_available():
        raise ConfigError("use_gpu is true: this machine has no CUDA device; set it to false")
    latest = folder.latest()
    state = read_state(latest) if latest else None
    if state is not None:
        require_resumable(job.config, state["settings"], job.base_hash)
    if latest and state is not None and state["iteration"] >= job.config.iterations:
        return latest
    trainer = job.trainer(device)
    if state is not None:
        trainer.load_state_dict(state)
    run_training(trainer, save=folder.save, on_metrics=on_metrics, should_stop=should_stop)
    newest = folder.latest()
    assert newest is not None
    return newest
