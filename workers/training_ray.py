"""The Ray Train side of fit_basis: worker loop, progress to the driver, restarts and stopping.

Checkpoints are the run's own (see workers.checkpoints), not Ray's: a group of workers, however it was started,
goes on from what rank 0 finds there.
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch import distributed as dist

from blend.finetune.checkpoint import STATE_FILE, Checkpoints, parse_state
from blend.finetune.errors import ConfigError, FinetuneError, StoppedError
from blend.finetune.held_out import Metrics
from blend.finetune.loop import run_training
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import TorchWorkgroup, Workgroup
from blend.rewards import Reward
from workers.cluster import ray_session
from workers.reward_actors import reward_actors
from workers.training import TrainJob, is_finished, read_resumable, resume
from workers.training_board import MAX_FAILURES, Board
from workers.training_restarts import Crashes, start_lean

POLL_SECONDS = 0.2
# how long workers may take to stop by themselves, and then to be killed
STOP_SECONDS = 5
KILL_SECONDS = 10


def fit_on_ray(
    job: TrainJob, open_checkpoints: Callable[[], Checkpoints], on_metrics: Callable[[Metrics], None]
) -> Path:
    """Train on `num_workers` Ray workers, resuming from the newest checkpoint; returns the last one.

    Uses the Ray in use if there is one. The coordinating actors take no CPU, so that runs of one worker each
    share a cluster of as many CPUs. An exception in the calling thread (Ctrl-C, SIGTERM, a cancelled flow) stops the
    workers within seconds, wherever they are; what was kept before can be resumed.
    """
    config = job.config
    checkpoints = open_checkpoints()
    latest, state = read_resumable(job, checkpoints)
    if latest and state and is_finished(state, config):
        return latest
    # a private cluster claims no CPU that is not there, and has all GPUs
    with (
        _sigterm_raises() as restore,
        ray_session(num_cpus=min(config.num_workers, os.cpu_count() or 1)),
        reward_actors(config) as rewards,
        tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as bookkeeping,
    ):
        restore()
        _require_resources(job)
        board = ray.remote(num_cpus=0)(Board).remote(state["iteration"] if state else -1)
        trainer = TorchTrainer(
            start_lean(worker_loop, job, open_checkpoints, board=board, rewards=rewards),
            scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu),
            run_config=RunConfig(
                name=config.name,
                storage_path=bookkeeping,
                # how often is for the board to say, which knows of progress
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[Crashes(board)],
            ),
        )
        _follow(_Fit(trainer), board, on_metrics, config.name)
    newest, state = read_resumable(job, checkpoints)
    if newest is None or state is None or not is_finished(state, config):
        raise FinetuneError(f"{config.name!r} was stopped on Ray before its end: run it again to resume")
    return newest


def _follow(fit: "_Fit", board: ActorHandle, on_metrics: Callable[[Metrics], None], name: str) -> None:
    """Run `fit` to its end, passing metrics on; raises the error that ended it, when all workers have stopped."""
    fit.start()
    try:
        error = None
        while error is None and not fit.ended.wait(POLL_SECONDS):
            error = _relay(board, on_metrics)
        error = error or _relay(board, on_metrics)
        if error is not None:
            # on a GPU the others may wait for the rank that failed until nccl gives up, minutes later
            _stop(board, fit)
    except BaseException:
        _stop(board, fit)
        raise
    if error is not None:
        raise error
    if fit.error is not None:
        raise FinetuneError(
            f"{name!r} failed on Ray {MAX_FAILURES} times in a row without progress "
            f"({ray.get(board.failure.remote()) or fit.error}): run it again to resume from the last checkpoint"
        ) from fit.error


class _Fit(threading.Thread):
    """TorchTrainer.fit in its own thread, so that the calling thread shows progress and can be stopped.

    Wait for `ended`, not with join: Python 3.11 takes a thread for ended once an exception, as of Ctrl-C, meets the
    join, and a thread still in Ray when it is shut down ends the process on the spot.
    """

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._trainer = trainer
        self.ended = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


@contextmanager
def _sigterm_raises() -> Iterator[Callable[[], None]]:
    """Yield what makes SIGTERM raise in the main thread again after ray.init took it, which would drain for long.

    Whoever handled SIGTERM before (Prefect's engine raises at it) goes on doing so; by default it is SystemExit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    try:
        yield lambda: signal.signal(signal.SIGTERM, leave if before == signal.SIG_DFL else before) and None
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(board: ActorHandle, fit: _Fit) -> None:
    """Ask the workers to stop, then end those that did not; the cluster may be gone already."""
    with suppress(Exception):
        ray.get(board.request_stop.remote(), timeout=STOP_SECONDS)
        if not fit.ended.wait(STOP_SECONDS):
            for worker in ray.get(board.workers.remote(), timeout=KILL_SECONDS):
                ray.kill(worker)
            fit.ended.wait(KILL_SECONDS)


def _relay(board: ActorHandle, on_metrics: Callable[[Metrics], None]) -> FinetuneError | None:
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


def worker_loop(
    job: TrainJob, open_checkpoints: Callable[[], Checkpoints], *, board: ActorHandle, rewards: Mapping[str, Reward]
) -> None:
    """What each Ray Train worker runs; rank 0 reads and writes checkpoints and posts metrics."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    context = ray.train.get_context()
    if not ray.get(board.enter.remote(context.get_world_rank(), ray.get_runtime_context().current_actor)):
        return
    with _watch(board) as stop:
        try:
            workgroup = TorchWorkgroup(get_device()) if context.get_world_size() > 1 else Workgroup()
            trainer = job.trainer(str(get_device()), workgroup, rewards)
            trainer.should_stop = stop.is_set
            train_rank(trainer, board, open_checkpoints)
        except Exception as error:
            if isinstance(error, FinetuneError):
                if not isinstance(error, StoppedError):
                    ray.get(board.fail.remote(error))
            elif not stop.is_set() and not ray.get(board.over.remote()):
                raise
            # whoever waits for this rank in a sum gets an error instead of waiting on
            if dist.is_initialized():
                dist.destroy_process_group()


def train_rank(trainer: Trainer, board: ActorHandle, open_checkpoints: Callable[[], Checkpoints]) -> None:
    """One rank's training, from the checkpoint that rank 0 finds: all get its bytes, so all begin at the same place."""
    first = trainer.workgroup.rank == 0
    checkpoints = open_checkpoints() if first else None
    latest = checkpoints.latest() if checkpoints else None
    if kept := trainer.workgroup.share((latest / STATE_FILE).read_bytes() if latest else b""):
        resume(trainer, parse_state(kept))

    def save(trainer: Trainer) -> None:
        if checkpoints:
            checkpoints.save(trainer)
            ray.get(board.keep.remote(trainer.iteration))

    def post(metrics: Metrics) -> None:
        if first:
            ray.get(board.post.remote(metrics))

    if first:
        ray.get(board.keep.remote(trainer.iteration))
        for metrics in trainer.history:
            post(metrics)
    run_training(trainer, save=save, on_metrics=post, should_stop=trainer.should_stop)


@contextmanager
def _watch(board: ActorHandle) -> Iterator[threading.Event]:
    """An event that is set within POLL_SECONDS of the wish to stop, or when there is nobody left to ask."""
    stop, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            try:
                over = ray.get(board.over.remote())
            except Exception:
                over = True
            if over:
                stop.set()
                return

    thread = threading.Thread(target=watch, daemon=True, name="watch-board")
    thread.start()
    try:
        yield stop
    finally:
        done.set()
        thread.join()
