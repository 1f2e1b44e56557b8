"""The Ray Train side of fit_basis: worker loop, progress to the driver, stopping."""

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from blend.finetune.checkpoint import read_state, write_checkpoint
from blend.finetune.errors import ConfigError, FinetuneError
from blend.finetune.held_out import Metrics
from blend.finetune.loop import run_training
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import TorchWorkgroup, Workgroup
from blend.rewards import Reward
from workers.cluster import ray_session
from workers.reward_actors import reward_actors
from workers.training import TrainJob

POLL_SECONDS = 0.2
STOP_SECONDS = 60
# a crashed worker group starts again from the last checkpoint; errors of the run itself are never retried
MAX_FAILURES = 3


class Board:
    """An actor between workers and driver: metrics and errors one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._metrics: list[Metrics] = []
        self._error: FinetuneError | None = None
        self._stopping = False

    def post(self, metrics: Metrics) -> None:
        self._metrics.append(metrics)

    def fail(self, error: FinetuneError) -> None:
        self._error = error

    def drain(self) -> tuple[list[Metrics], FinetuneError | None]:
        """Metrics posted since the last call, and the error that ended the run if there is one."""
        metrics, self._metrics = self._metrics, []
        return metrics, self._error

    def request_stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping


def fit_on_ray(job: TrainJob, storage: Path, on_metrics: Callable[[Metrics], None]) -> Path:
    """Train on `num_workers` Ray workers, resuming what `storage` holds; returns the last checkpoint.

    Uses the Ray in use if there is one. The coordinating actors take no CPU, so that runs of one worker each
    share a cluster of as many CPUs. An exception in the calling thread (Ctrl-C, a cancelled flow) stops the
    workers after their current iteration.
    """
    workers = job.config.num_workers
    # where rewards take GPUs too, a private cluster has all there are
    num_gpus = workers if job.config.use_gpu and not job.config.reward_gpus else None
    with ray_session(num_cpus=workers, num_gpus=num_gpus), reward_actors(job.config) as rewards:
        _require_resources(job)
        board = ray.remote(num_cpus=0)(Board).remote()
        trainer = TorchTrainer(
            lambda: worker_loop(job, board, rewards),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=job.config.use_gpu),
            run_config=RunConfig(
                name=job.config.name,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        fit = _Fit(trainer)
        fit.start()
        try:
            while fit.is_alive():
                fit.join(POLL_SECONDS)
                _relay(board, on_metrics)
        except BaseException:
            ray.get(board.request_stop.remote())
            fit.join(STOP_SECONDS)
            raise
        error = _relay(board, on_metrics)
        if error is not None:
            raise error
        if fit.error is not None:
            raise FinetuneError(
                f"{job.config.name!r} failed on Ray after {MAX_FAILURES} restarts ({fit.error}): run it again "
                f"to resume from the last checkpoint in {storage}"
            ) from fit.error
        assert fit.result is not None
        return Path(fit.result.checkpoint.path)


class _Fit(threading.Thread):
    """TorchTrainer.fit in its own thread, so that the calling thread shows progress and can be stopped."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._trainer = trainer
        self.result: ray.train.Result | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._trainer.fit()
        except Exception as error:
            self.error = error


def _relay(board: "ray.actor.ActorHandle", on_metrics: Callable[[Metrics], None]) -> FinetuneError | None:
    metrics, error = ray.get(board.drain.remote())
    for line in metrics:
        on_metrics(line)
    return error


def _require_resources(job: TrainJob) -> None:
    kind = "GPU" if job.config.use_gpu else "CPU"
    present = int(ray.cluster_resources().get(kind, 0))
    if present < job.config.num_workers:
        raise ConfigError(
            f"num_workers is {job.config.num_workers}: the Ray cluster has {present} {kind}s; lower it, "
            "or use 0 to train in this process"
        )


def worker_loop(job: TrainJob, board: "ray.actor.ActorHandle", rewards: Mapping[str, Reward]) -> None:
    """What each Ray Train worker runs; rank 0 writes checkpoints and posts metrics."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    device = get_device()
    alone = ray.train.get_context().get_world_size() == 1
    workgroup = Workgroup() if alone else TorchWorkgroup(device)
    first = workgroup.rank == 0

    def save(trainer: Trainer) -> None:
        facts = {"iteration": trainer.iteration}
        if not first:
            ray.train.report(facts)
            return
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(trainer, Path(directory))
            ray.train.report(facts, checkpoint=Checkpoint.from_directory(directory))

    def should_stop() -> bool:
        # every rank must agree, or the others would wait for the one that left
        asked = torch.tensor([float(first and ray.get(board.stopping.remote()))])
        return bool(workgroup.sum_(asked).item())

    try:
        trainer = job.trainer(str(device), workgroup, rewards)
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            with checkpoint.as_directory() as directory:
                trainer.load_state_dict(read_state(Path(directory)))
        run_training(
            trainer,
            save=save,
            on_metrics=lambda metrics: ray.get(board.post.remote(metrics)) if first else None,
            should_stop=should_stop,
        )
    except FinetuneError as error:
        if first:
            ray.get(board.fail.remote(error))
