"""Hand the items of a job to scorers: in this process, or on Ray actors that take one when they are free."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from blend.finetune.errors import FinetuneError
from blend.rewards import Reward
from workers.cluster import ray_session
from workers.evaluation.config import EvaluationError
from workers.evaluation.job import Item, Job
from workers.evaluation.scoring import Scored, Scorer

# A cluster that gives no actor within this time has no free CPU for us.
START_TIMEOUT_S = 600.0


def score_all(job: Job, items: Sequence[Item]) -> Iterator[Scored]:
    """Score the items in any order; yields each as soon as it is done."""
    if not items:
        return
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
        actor_class: Any = ray.remote(
            num_cpus=1, num_gpus=job.config.gpus_per_worker, max_restarts=2, max_task_retries=2
        )(Scorer)
        shared = ray.put(job)
        actors: list[Any] = [actor_class.remote(shared, rewards, own_process=True) for _ in range(count)]
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
                remote_rewards(list(job.rewards), config.reward_actors, config.reward_gpus, gpus_beside=beside)
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
