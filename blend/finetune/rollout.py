"""Rollouts: which images an iteration makes, sampled through the blend engine and scored.

Everything random is keyed by (seed, iteration, position), so that a batch does not depend on the number of
workers and a resumed run draws what the uninterrupted one would have: there is no generator state to save.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blend.engine import BlendEngine, Output, Sample, Trajectory
from blend.finetune.config import TrainConfig
from blend.preference import Preference
from blend.rewards import Reward

DECODE_BATCH = 32


@dataclass(frozen=True, slots=True)
class Request:
    """One image to make: `index` is its place in the global batch, `group` the number of its prompt."""

    index: int
    group: int
    prompt: str
    seed: int

    def __str__(self) -> str:
        return f"{self.prompt!r} (seed {self.seed})"


@dataclass(frozen=True, slots=True)
class Scored:
    """Requests and outputs: images [N, 3, H, W] on the CPU, rewards [N] (NaN where sampling failed)."""

    requests: tuple[Request, ...]
    outputs: tuple[Output, ...]
    images: Tensor
    rewards: Tensor

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The recorded paths, for outputs that have one."""
        return tuple(output.trajectory for output in self.outputs if output.trajectory is not None)


def keyed_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on the parts alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_permutation(count: int, *parts: object) -> list[int]:
    """A permutation of range(count) that depends on the parts alone."""
    generator = torch.Generator().manual_seed(keyed_seed(*parts))
    return torch.randperm(count, generator=generator).tolist()


def plan_requests(config: TrainConfig, prompts: Sequence[str], iteration: int) -> list[Request]:
    """The global batch of an iteration: prompts without replacement until all were used, then again."""
    rounds = -(-config.prompts_per_iteration // len(prompts))
    order = [
        i for turn in range(rounds) for i in keyed_permutation(len(prompts), config.seed, "prompts", iteration, turn)
    ]
    return [
        Request(index, group, prompts[order[group]], keyed_seed(config.seed, "image", iteration, index) % 2**31)
        for index in range(config.batch_size)
        for group in [index // config.images_per_prompt]
    ]


def plan_held_out(config: TrainConfig, prompts: Sequence[str]) -> list[Request]:
    """The fixed prompts and seeds of the held-out evaluation, the same for every adapter and every `seed`."""
    return [
        Request(index, index % len(prompts), prompts[index % len(prompts)], keyed_seed("held-out", index) % 2**31)
        for index in range(config.held_out_images)
    ]


def choose_steps(config: TrainConfig, iteration: int, index: int, trainable: Sequence[int]) -> dict[int, float]:
    """The trained steps of sample `index`, in random order, with the number of trainable steps each stands for.

    Every rewarded step, which stands for itself, and a random subset of the others (of all, when rewarded_steps is 0).
    """
    first = list(trainable[: config.rewarded_steps])
    rest = trainable[config.rewarded_steps :]
    order = keyed_permutation(len(rest), config.seed, "steps", iteration, index)
    drawn = [rest[i] for i in order[: config.train_steps_per_sample - len(first)]]
    return dict.fromkeys(drawn, len(rest) / max(1, len(drawn))) | dict.fromkeys(first, 1.0)


class Sampler:
    """Makes and scores images of one adapter with the engine that also serves."""

    def __init__(self, config: TrainConfig, engine: BlendEngine, reward: Reward) -> None:
        self.config = config
        self.engine = engine
        self.reward = reward
        self._preference = Preference(weights={config.name: 1.0})

    def roll_out(self, requests: Sequence[Request]) -> Scored:
        """Sample with recorded trajectories."""
        return self._score(requests, guidance_scale=self.config.guidance_scale, record=True, measure_kl=False)

    def evaluate(self, requests: Sequence[Request]) -> Scored:
        """Sample as it is served, with the path KL to the base measured in the same forwards."""
        return self._score(requests, guidance_scale=self.config.eval_guidance_scale, record=False, measure_kl=True)

    def _score(self, requests: Sequence[Request], *, guidance_scale: float, record: bool, measure_kl: bool) -> Scored:
        samples = [
            Sample(
                prompt=request.prompt,
                preference=self._preference,
                seed=request.seed,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=guidance_scale,
                eta=self.config.eta,
                record=record,
                measure_kl=measure_kl,
            )
            for request in requests
        ]
        outputs = self.engine.run(samples)
        rewards = torch.full((len(requests),), float("nan"))
        images = None
        made = [(i, output.latents) for i, output in enumerate(outputs) if output.latents is not None]
        for start in range(0, len(made), DECODE_BATCH):
            part = [i for i, _ in made[start : start + DECODE_BATCH]]
            decoded = self.engine.decode([latents for _, latents in made[start : start + DECODE_BATCH]]).float().cpu()
            if images is None:
                images = decoded.new_zeros((len(requests), *decoded.shape[1:]))
            images[part] = decoded
            rewards[part] = self.reward(decoded, [requests[i].prompt for i in part]).float().cpu()
        if images is None:
            images = torch.zeros(len(requests), 3, 1, 1)
        return Scored(tuple(requests), tuple(outputs), images, rewards)
