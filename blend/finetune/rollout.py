"""Rollouts: which images an iteration makes, sampled through the blend engine and scored.

Everything random is keyed by (seed, iteration, position), so that a batch does not depend on the number of
workers and a resumed run draws what the uninterrupted one would have: there is no generator state to save.
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blend.engine import BlendEngine, Output, Sample, Trajectory
from blend.finetune.config import TrainConfig
from blend.finetune.errors import FinetuneError, StoppedError
from blend.preference import Preference
from blend.rewards import Reward, start_scoring
from blend.rewards.weighted import WeightedReward

DECODE_BATCH = 32
POLL_SECONDS = 0.2  # between two looks at the wish to stop, while scores are waited for


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
    """Requests and what came of them; scores are NaN where sampling failed."""

    requests: tuple[Request, ...]
    outputs: tuple[Output, ...]
    images: Tensor  # [N, 3, H, W] on the CPU from evaluate(), [0, 3, 0, 0] from roll_out(), which keeps none
    rewards: Tensor  # [N]
    watched: Mapping[str, Tensor] = field(default_factory=dict)  # other rewards [N] by name, from evaluate() alone

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
    """The fixed prompts and seeds of the held-out evaluation, the same for every adapter and every `seed`.

    Images of one prompt are neighbours and one group; prompts are used again, as new groups, when there are too few.
    """
    return [
        Request(index, group, prompts[group % len(prompts)], keyed_seed("held-out", index) % 2**31)
        for index in range(config.held_out_images)
        for group in [index // config.held_out_images_per_prompt]
    ]


def choose_steps(config: TrainConfig, iteration: int, index: int, trainable: Sequence[int]) -> dict[int, float]:
    """The trained steps of sample `index`, in random order, with the number of trainable steps each stands for.

    Every rewarded step, which stands for itself, and some of the others (of all, when rewarded_steps is 0): a random
    subset, or a window of neighbours that goes on at the beginning when it reaches the end, so that none is favoured.
    """
    first = list(trainable[: config.rewarded_steps])
    rest = trainable[config.rewarded_steps :]
    order = keyed_permutation(len(rest), config.seed, "steps", iteration, index)
    count = min(len(rest), config.train_steps_per_sample - len(first))
    if config.step_choice == "window":
        order = [(order[0] + offset) % len(rest) for offset in range(count)]
    drawn = [rest[i] for i in order[:count]]
    return dict.fromkeys(drawn, len(rest) / max(1, len(drawn))) | dict.fromkeys(first, 1.0)


class Sampler:
    """Makes and scores images of one adapter with the engine that also serves.

    Images are decoded and handed to the rewards as samples end: one that computes elsewhere does so while the
    others are still sampled. `should_stop` is asked between any two steps of the engine and while
    scores are waited for.
    """

    def __init__(
        self, config: TrainConfig, engine: BlendEngine, reward: Reward, watched: Mapping[str, Reward] | None = None
    ) -> None:
        """`watched` are rewards that evaluate() reports beside the trained one; those in a mix are reported too."""
        self.config = config
        self.engine = engine
        self.reward = reward
        self.watched = {**(reward.rewards if isinstance(reward, WeightedReward) else {}), **(watched or {})}
        self.should_stop: Callable[[], bool] = lambda: False
        self._preference = Preference(weights={config.name: 1.0})

    def roll_out(self, requests: Sequence[Request], references: Sequence[Collection[int]] = ()) -> Scored:
        """Sample with recorded trajectories; the images are let go once they are scored.

        references: each sample's steps at which the base is evaluated too.
        """
        scoring = Scoring(self.engine, [self.reward], requests, keep_images=False)
        outputs = self._sample(
            requests, scoring, guidance_scale=self.config.guidance_scale, record=True, references=references
        )
        [rewards] = scoring.scores(self._refuse_to_go_on)
        return Scored(tuple(requests), outputs, scoring.images, rewards)

    def evaluate(self, requests: Sequence[Request]) -> Scored:
        """Sample as it is served, with the path KL to the base measured in the same forwards."""
        mix = self.reward if isinstance(self.reward, WeightedReward) else None
        # a mix follows from the rewards in it, which are watched
        trained = [] if mix else [self.reward]
        scoring = Scoring(self.engine, [*trained, *self.watched.values()], requests, keep_images=True)
        outputs = self._sample(requests, scoring, guidance_scale=self.config.eval_guidance_scale, record=False)
        scores = scoring.scores(self._refuse_to_go_on)
        watched = dict(zip(self.watched, scores[len(trained) :], strict=True))
        rewards = mix.combine(watched) if mix else scores[0]
        return Scored(tuple(requests), outputs, scoring.images, rewards, watched)

    def _sample(
        self,
        requests: Sequence[Request],
        scoring: "Scoring",
        *,
        guidance_scale: float,
        record: bool,
        references: Sequence[Collection[int]] = (),
    ) -> tuple[Output, ...]:
        """Step the engine until all samples ended, passing each on as it ends; StoppedError when asked to stop."""
        samples = [
            Sample(
                prompt=request.prompt,
                preference=self._preference,
                seed=request.seed,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=guidance_scale,
                eta=self.config.eta,
                record=record,
                measure_kl=not record,
                reference_steps=tuple(reference),
            )
            for request, reference in zip(requests, references or [()] * len(requests), strict=True)
        ]
        assert self.engine.idle, "the engine is this sampler's alone"
        places: dict[int, int] = {}
        outputs: dict[int, Output] = {}
        try:
            for place, sample in enumerate(samples):
                places[self.engine.submit(sample)] = place
            while not self.engine.idle:
                self._refuse_to_go_on()
                for ticket, output in self.engine.step().items():
                    if isinstance(output.error, torch.OutOfMemoryError):
                        raise output.error
                    outputs[places[ticket]] = output
                    scoring.add(places[ticket], output)
        finally:
            for ticket in places:
                self.engine.abort(ticket)
        return tuple(outputs[place] for place in range(len(samples)))

    def _refuse_to_go_on(self) -> None:
        """Raise StoppedError when asked to stop."""
        if self.should_stop():
            raise StoppedError(f"{self.config.name!r} was stopped while sampling: run it again to resume")


class Scoring:
    """Decodes the samples of some requests as they end, a batch at a time, and has each batch scored at once."""

    def __init__(
        self, engine: BlendEngine, rewards: Sequence[Reward], requests: Sequence[Request], *, keep_images: bool
    ) -> None:
        self.images = torch.zeros(len(requests) if keep_images else 0, 3, 0, 0)  # [N, 3, H, W] where they are kept
        self._engine = engine
        self._rewards = rewards
        self._requests = requests
        self._keep_images = keep_images
        self._ended: list[tuple[int, Tensor]] = []
        self._started: list[tuple[list[int], list[Callable[[], Tensor]]]] = []

    def add(self, place: int, output: Output) -> None:
        """Take the output of request number `place`; one without latents gets no score."""
        if output.latents is not None:
            self._ended.append((place, output.latents))
        if len(self._ended) == DECODE_BATCH:
            self._start()

    def scores(self, poll: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Wait for the scores [N] of each reward; FinetuneError names a reward that failed, prompts and seeds.

        poll is called while there is nothing but waiting, and may raise.
        """
        if self._ended:
            self._start()
        found = [torch.full((len(self._requests),), float("nan")) for _ in self._rewards]
        for places, waits in self._started:
            for reward, wait, scores in zip(self._rewards, waits, found, strict=True):
                with self._naming(reward, places):
                    scores[places] = _result_of(wait, poll)
        return found

    def _start(self) -> None:
        places = [place for place, _ in self._ended]
        decoded = self._engine.decode([latents for _, latents in self._ended]).float().cpu()
        self._ended.clear()
        if self._keep_images:
            if self.images.shape[2:] != decoded.shape[2:]:
                self.images = decoded.new_zeros(len(self._requests), *decoded.shape[1:])
            self.images[places] = decoded
        prompts = [self._requests[place].prompt for place in places]
        waits = []
        for reward in self._rewards:
            with self._naming(reward, places):
                waits.append(start_scoring(reward, decoded, prompts))
        self._started.append((places, waits))

    @contextmanager
    def _naming(self, reward: Reward, places: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except StoppedError:
            raise
        except Exception as error:
            first = "; ".join(str(self._requests[place]) for place in places[:3])
            raise FinetuneError(
                f"the reward {reward.name!r} failed on {len(places)} images, first {first}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _result_of(wait: Callable[[], Tensor], poll: Callable[[], None]) -> Tensor:
    """What `wait` returns or raises; it may never do so, therefore elsewhere, and `poll` is called here meanwhile."""
    future: futures.Future[Tensor] = futures.Future()

    def run() -> None:
        try:
            future.set_result(wait())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="wait-for-scores").start()
    while not futures.wait([future], timeout=POLL_SECONDS).done:
        poll()
    return future.result()
