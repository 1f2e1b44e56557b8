"""Rewards on Ray actors: models with devices of their own, which score images while the workers sample the next."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError, FinetuneError
from blend.rewards import MovableReward, Reward, RewardError, load_reward, start_scoring

# a batch whose actor died is scored again this many times: one that kills every actor must end the run
TASK_RETRIES = 3
# and so often may an actor die in a whole run; without a limit, one that dies as it starts would do so for ever
MAX_RESTARTS = 20
# a cluster that starts no actor within this time has no GPU free for it
START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class RewardFacts:
    """What a reward says of itself."""

    name: str
    version: str
    range: tuple[float, float]


class RewardActor:
    """The rewards of a run in a process of its own, on its GPU where it has one."""

    def __init__(self, *, on_gpu: bool) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self._device = "cuda" if on_gpu else "cpu"
        self._rewards: dict[str, Reward] = {}

    def load(self, names: Sequence[str]) -> list[RewardFacts]:
        """Load these rewards and answer what they are."""
        loaded = [self._reward(name) for name in names]
        return [RewardFacts(reward.name, reward.version, reward.range) for reward in loaded]

    def score(self, name: str, images: NDArray[np.float32], prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W]; returns float32 [B]."""
        # what Ray hands over is read-only shared memory: a reward may write to its images
        return start_scoring(self._reward(name), torch.from_numpy(images.copy()), prompts)()

    def _reward(self, name: str) -> Reward:
        # not in the constructor: a restarted actor is asked to score at once, and an error here keeps its own type
        if name not in self._rewards:
            reward = load_reward(name)
            self._rewards[name] = reward.to(self._device) if isinstance(reward, MovableReward) else reward
        return self._rewards[name]


class RemoteReward:
    """Stands for a reward that actors compute; each batch goes to the next of them."""

    # no gradient comes back from another process, whatever the reward itself allows
    differentiable = False

    def __init__(self, facts: RewardFacts, actors: "Sequence[ray.actor.ActorHandle]") -> None:
        self.name, self.version, self.range = facts.name, facts.version, facts.range
        self._actors = tuple(actors)
        self._submitted = 0

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Callable[[], Tensor]:
        """Send images [B, 3, H, W]; the returned function waits for the scores [B]."""
        # workers, which share the actors, begin with different ones
        actor = self._actors[(os.getpid() + self._submitted) % len(self._actors)]
        self._submitted += 1
        reference = actor.score.remote(self.name, images.detach().float().cpu().numpy(), list(prompts))
        return lambda: _result(reference)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] and wait for it; returns float32 [B]."""
        return self.submit(images, prompts)()


@contextmanager
def reward_actors(config: TrainConfig) -> Iterator[dict[str, Reward]]:
    """The trained and the watched rewards of a run on its `reward_actors`: see remote_rewards."""
    names, beside = [*config.rewards, *config.guard.watch], config.num_workers if config.use_gpu else 0
    with remote_rewards(names, config.reward_actors, config.reward_gpus, gpus_beside=beside) as rewards:
        yield rewards


@contextmanager
def remote_rewards(
    names: Sequence[str], count: int, gpus_each: float = 0.0, *, gpus_beside: int = 0
) -> Iterator[dict[str, Reward]]:
    """Yield these rewards by name, built in or plugins, each served by all `count` actors; {} for no actors.

    Needs a connected Ray cluster; they may be sent to its other processes and end with the context. `gpus_beside`
    are taken by others. ConfigError when the cluster lacks the GPUs, or an actor the reward's package; FinetuneError
    when an actor does not start.
    """
    if not count:
        yield {}
        return
    _require_gpus(count, gpus_each, gpus_beside)
    # No CPU: a cluster may have just the CPUs that its workers take, and an actor that waits for one while they wait
    # for its scores would never start.
    actor_class = ray.remote(num_cpus=0, num_gpus=gpus_each, max_restarts=MAX_RESTARTS, max_task_retries=TASK_RETRIES)(
        RewardActor
    )
    actors = [actor_class.remote(on_gpu=gpus_each > 0) for _ in range(count)]
    try:
        references = [actor.load.remote(list(names)) for actor in actors]
        done, waiting = ray.wait(references, num_returns=len(references), timeout=START_TIMEOUT_S)
        if waiting:
            raise FinetuneError(
                f"reward_actors is {len(actors)}: {len(waiting)} of them did not start within {START_TIMEOUT_S:.0f} s; "
                "stop another job that has the GPUs, or lower reward_gpus"
            )
        yield {facts.name: RemoteReward(facts, actors) for facts in _loaded(done)}
    finally:
        for actor in actors:
            ray.kill(actor)


def _loaded(references: "Sequence[ray.ObjectRef]") -> list[RewardFacts]:
    try:
        answers = [_result(reference) for reference in references]
    except RewardError as error:
        raise ConfigError(
            f"a reward actor cannot load its rewards: {error} (a plugin must be installed on every machine)"
        ) from error
    return answers[0]


def gpus_of(actors: int, each: float) -> int:
    """GPUs that so many actors take; a GPU is shared by as many as fit whole."""
    if each == 0:
        return 0
    if each > 1 and each != int(each):
        raise ConfigError(f"reward_gpus is {each:g}: use a share of one GPU, or a whole number of them")
    return int(actors * each) if each >= 1 else math.ceil(actors / math.floor(1 / each))


def _require_gpus(count: int, each: float, beside: int) -> None:
    own = gpus_of(count, each)
    present = int(ray.cluster_resources().get("GPU", 0))
    if own and present < own + beside:
        raise ConfigError(
            f"reward_gpus is {each:g} and reward_actors {count}: they need {own} GPUs"
            f"{f' beside the {beside} of the workers' if beside else ''} and the Ray cluster has {present}; "
            "lower either; reward_gpus = 0 scores on the CPU"
        )


def _result(reference: "ray.ObjectRef") -> Any:
    """What an actor answered; its own exception rather than Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RayActorError as error:
        raise FinetuneError(
            f"its actor died, and so did those that took its place ({error}); reward_actors = 0 scores in the workers"
        ) from error
