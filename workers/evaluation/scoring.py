"""Generate and score the samples of a plan, in this process or on Ray actors.

A work item is one cell at a few prompts with all their seeds, generated as one batch so that rows and seconds
belong to that cell alone. Noise is keyed by (seed, step), so results do not depend on who does which item.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blend.engine import Sample
from blend.finetune.errors import FinetuneError
from blend.metrics import diversity
from blend.rewards import MovableReward, Reward, RewardError, load_reward, start_scoring
from workers.bundles import LoadedBundle, load_engine
from workers.cluster import ray_session
from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.grid import Cell

# A cluster that gives no actor within this time has no free CPU for us.
START_TIMEOUT_S = 600.0
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """Prompts [P] of one cell, as positions in the job; of `pictures` the first seed is kept."""

    cell: int
    prompts: tuple[int, ...]
    pictures: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of an item: one record per sample, and uint8 images [H, W, 3] keyed by prompt position."""

    item: Item
    records: list[Record]
    pictures: dict[int, NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """All that a scorer needs to know; small enough to send to every actor."""

    config: EvaluateConfig
    bundle: LoadedBundle
    basis: tuple[str, ...]
    cells: tuple[Cell, ...]
    prompts: tuple[str, ...]
    rewards: tuple[str, ...]


def plan_items(job: Job, pictured: Sequence[int] = ()) -> list[Item]:
    """Cut every cell into batches of at most batch_size samples; pictured cells keep images."""
    per_item = max(1, job.config.batch_size // len(job.config.seeds))
    shown = frozenset(range(min(job.config.picture_prompts, len(job.prompts))))
    return [
        Item(cell, chunk, shown & frozenset(chunk) if cell in pictured else frozenset())
        for cell in range(len(job.cells))
        for chunk in _chunks(range(len(job.prompts)), per_item)
    ]


class Scorer:
    """One copy of the bundle and the rewards; scores items one after another."""

    def __init__(self, job: Job, rewards: Mapping[str, Reward] | None = None, *, own_process: bool = False) -> None:
        """`rewards`, by name, are computed elsewhere; the others are loaded here."""
        on_gpu = job.config.gpus_per_worker > 0
        if own_process and not on_gpu:
            torch.set_num_threads(1)
        self._job = job
        self._engine = load_engine(job.bundle, device="cuda" if on_gpu else "cpu")
        self._rewards: dict[str, Reward] = dict(rewards or {})
        self._warm_up()

    def _warm_up(self) -> None:
        """Encode the prompts and run once, so that no setting's seconds hold what happens only at first."""
        self._engine.model.encode_prompts(["", *self._job.prompts])
        first = replace(self._samples(Item(0, (0,)))[0], num_inference_steps=1)
        output = self._engine.run([first])[0]
        if output.latents is not None:
            self._engine.decode([output.latents])

    def ready(self) -> None:
        """Answers once bundle and rewards are loaded."""
        for name in self._job.rewards:
            self._reward(name)

    def _reward(self, name: str) -> Reward:
        # not in the constructor: an error there reaches the caller as an actor's death
        if name not in self._rewards:
            try:
                reward = load_reward(name)
            except RewardError as error:
                raise EvaluationError(
                    f"rewards: a worker cannot load it: {error} (a plugin must be installed on every machine)",
                    "rewards",
                ) from error
            movable = self._job.config.gpus_per_worker and isinstance(reward, MovableReward)
            self._rewards[name] = reward.to("cuda") if movable else reward
        return self._rewards[name]

    def score(self, item: Item) -> Scored:
        """Generate the item's samples, score them, and keep the pictures asked for."""
        samples = self._samples(item)
        started = time.perf_counter()
        outputs = self._engine.run(samples)
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise EvaluationError(f"generation failed: {failed}") from failed
        images = self._engine.decode([output.latents for output in outputs])
        seconds = (time.perf_counter() - started) / len(samples)
        columns = self._columns(images, [sample.prompt for sample in samples])
        records = [
            {
                "cell": item.cell,
                "prompt_index": item.prompts[position // len(self._job.config.seeds)],
                "seed": sample.seed,
                **{name: float(values[position]) for name, values in columns.items()},
                "rows": output.rows,
                "path_kl": np.nan if output.path_kl is None else output.path_kl,
                "seconds": seconds,
            }
            for position, (sample, output) in enumerate(zip(samples, outputs, strict=True))
        ]
        return Scored(item, records, self._pictures(item, images))

    def _samples(self, item: Item) -> list[Sample]:
        config = self._job.config
        preference = self._job.cells[item.cell].preference(self._job.basis)
        return [
            Sample(
                prompt=self._job.prompts[prompt],
                preference=preference,
                seed=seed,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                eta=config.eta,
                height=config.height,
                width=config.width,
                measure_kl=config.path_kl,
            )
            for prompt in item.prompts
            for seed in config.seeds
        ]

    def _columns(self, images: torch.Tensor, prompts: list[str]) -> dict[str, NDArray[np.float64]]:
        columns: dict[str, NDArray[np.float64]] = {}
        waits = {name: self._start(name, images, prompts) for name in self._job.rewards}
        for name, wait in waits.items():
            with _naming(name, prompts):
                values = wait().numpy().astype(np.float64)
            if not np.isfinite(values).all():
                raise EvaluationError(f"rewards: {name} gave {values} for {len(prompts)} images", "rewards")
            columns[name] = values
        seeds = len(self._job.config.seeds)
        array = images.detach().cpu().numpy()
        columns["diversity"] = np.concatenate(
            [diversity(array[start : start + seeds]) for start in range(0, len(array), seeds)]
        )
        return columns

    def _start(self, name: str, images: torch.Tensor, prompts: list[str]) -> Callable[[], torch.Tensor]:
        with _naming(name, prompts):
            return start_scoring(self._reward(name), images, prompts)

    def _pictures(self, item: Item, images: torch.Tensor) -> dict[int, NDArray[np.uint8]]:
        seeds = len(self._job.config.seeds)
        return {
            prompt: (images[position * seeds].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            for position, prompt in enumerate(item.prompts)
            if prompt in item.pictures
        }


@contextmanager
def _naming(name: str, prompts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(
            f"rewards: {name} failed on {len(prompts)} images, the first of {prompts[0]!r}: "
            f"{type(error).__name__}: {error}",
            "rewards",
        ) from error


def score_all(job: Job, items: Sequence[Item]) -> Iterator[Scored]:
    """Score the items in any order; yields each as soon as it is done."""
    if job.config.num_workers == 0:
        scorer = Scorer(job)
        yield from (scorer.score(item) for item in items)
    else:
        yield from _score_on_ray(job, deque(items))


def _score_on_ray(job: Job, queue: deque[Item]) -> Iterator[Scored]:
    """Every actor takes the next item when it is free, so that a slow one holds nobody up."""
    import ray

    remaining, count = len(queue), min(job.config.num_workers, len(queue))
    with ray_session(count), _rewards_elsewhere(job) as rewards:
        actor_class = ray.remote(num_cpus=1, num_gpus=job.config.gpus_per_worker, max_restarts=2, max_task_retries=2)(
            Scorer
        )
        shared = ray.put(job)
        actors = [actor_class.remote(shared, rewards, own_process=True) for _ in range(count)]
        started = False
        working: dict[Any, Any] = {actor.ready.remote(): actor for actor in actors}
        try:
            while remaining:
                reference = _next_done(list(working), timeout=None if started else START_TIMEOUT_S)
                started = True
                actor = working.pop(reference)
                scored = _result(reference)
                if queue:
                    working[actor.score.remote(queue.popleft())] = actor
                if scored is not None:
                    remaining -= 1
                    yield scored
        finally:
            for actor in actors:
                ray.kill(actor)


@contextmanager
def _rewards_elsewhere(job: Job) -> Iterator[dict[str, Reward]]:
    """The rewards on actors of their own; {} where each worker computes them."""
    from workers.reward_actors import remote_rewards

    config = job.config
    beside = math.ceil(config.num_workers * config.gpus_per_worker)
    with ExitStack() as stack:
        try:
            rewards = stack.enter_context(
                remote_rewards(job.rewards, config.reward_actors, config.reward_gpus, gpus_beside=beside)
            )
        except FinetuneError as error:
            raise EvaluationError(str(error), "reward_actors") from error
        yield rewards


def _next_done(references: list[Any], *, timeout: float | None) -> Any:
    """The next finished call; EvaluationError when nothing at all happens in time."""
    import ray

    done, _ = ray.wait(references, timeout=timeout)
    if not done:
        raise EvaluationError(
            f"num_workers: no worker started within {timeout:.0f} s: the cluster has no free CPU "
            "(stop another job) or GPU (lower gpus_per_worker)",
            "num_workers",
        )
    return done[0]


def _result(reference: Any) -> Any:
    """What the actor returned; its own EvaluationError rather than Ray's wrapping of it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EvaluationError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise EvaluationError(f"a worker died and could not be restarted: {error}", "num_workers") from error


def _chunks(positions: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(positions), size):
        yield tuple(positions[start : start + size])
