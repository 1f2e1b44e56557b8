"""Generate and score the samples of an item with one copy of the bundle.

An item is one cell at a few prompts with some of their seeds, generated as one batch so that rows, seconds and memory
belong to that cell alone. Noise is keyed by (seed, step), so results do not depend on who does which item.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from blend.engine import BlendEngine, DenoisingError, Output, Sample
from blend.metrics import diversity
from blend.rewards import MovableReward, Reward, RewardError, load_reward, start_scoring
from blend.rewards.weighted import WeightedReward
from workers.bundles import load_engine
from workers.evaluation.config import EvaluationError
from workers.evaluation.failures import GREY, without_failures
from workers.evaluation.job import Item, Job
from workers.evaluation.memory import PeakMemory
from workers.evaluation.rivals import Rival, search
from workers.evaluation.verdicts import judge_images

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of an item: a row of the ledger for each sample."""

    item: Item
    rows: list[Record]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image as latents, and what it took."""

    latents: torch.Tensor | None  # [C, h, w]; None where a rival failed
    rows: int
    decodes: int = 1
    gradients: int = 0
    path_kl: float | None = None  # nats


class Scorer:
    """One copy of the bundle, the oracles and the rewards; scores items one after another."""

    def __init__(self, job: Job, rewards: Mapping[str, Reward] | None = None, *, own_process: bool = False) -> None:
        """`rewards`, by name, are computed elsewhere; the others are loaded here."""
        on_gpu = job.config.gpus_per_worker > 0
        if own_process and not on_gpu:
            torch.set_num_threads(1)
        self._job = job
        self._engine = open_engine(job, "cuda" if on_gpu else "cpu")
        self._rewards: dict[str, Reward] = dict(rewards or {})
        self._memory = PeakMemory(self._engine.model.device)
        self._warm_up()

    def _warm_up(self) -> None:
        """Encode the prompts and run once, so that no setting's seconds hold what happens only at first."""
        self._engine.model.encode_prompts(["", *self._job.prompts])
        first = replace(self._job.sample(0, self._job.prompts[0], 0), num_inference_steps=1)
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
            self._rewards[name] = self._load(name)
        return self._rewards[name]

    def _load(self, name: str) -> Reward:
        try:
            reward = load_reward(name)
        except RewardError as error:
            raise EvaluationError(
                f"rewards: a worker cannot load it: {error} (a plugin must be installed on every machine)", "rewards"
            ) from error
        return reward.to("cuda") if self._job.config.gpus_per_worker and isinstance(reward, MovableReward) else reward

    def score(self, item: Item) -> Scored:
        """Generate the item's samples, score them, and keep the pictures asked for."""
        samples = [
            self._job.sample(item.cell, self._job.prompts[prompt], seed)
            for prompt in item.prompts
            for seed in item.seeds
        ]
        self._memory.reset()
        started = time.perf_counter()
        drawn = self._draw(item.cell, samples)
        images, failed = self._decode(item.cell, samples, drawn)
        seconds = (time.perf_counter() - started) / len(samples)
        memory = self._memory.peak_mb()
        columns = self._columns(item, images, failed, [sample.prompt for sample in samples])
        return Scored(
            item,
            [
                {
                    "key": self._job.key(item.cell, sample.prompt, sample.seed),
                    "prompt": sample.prompt,
                    "seed": sample.seed,
                    "company": company(item.seeds),
                    **{name: values[position] for name, values in columns.items()},
                    "rows": one.rows,
                    "decodes": one.decodes,
                    "gradients": one.gradients,
                    "failed": int(failed[position]),
                    "path_kl": np.nan if one.path_kl is None else one.path_kl,
                    "seconds": seconds,
                    "memory_mb": memory,
                    "png": _png(images[position]) if self._pictured(item, position) else None,
                }
                for position, (sample, one) in enumerate(zip(samples, drawn, strict=True))
            ],
        )

    def _pictured(self, item: Item, position: int) -> bool:
        prompt, seed = divmod(position, len(item.seeds))
        return seed == 0 and item.prompts[prompt] in item.pictures

    def _draw(self, cell: int, samples: list[Sample]) -> list[Drawn]:
        rival = self._job.rival(cell)
        if rival is not None and rival.searches:
            return self._search(cell, rival, samples)
        return [_drawn(output, rival) for output in self._engine.run(samples)]

    def _search(self, cell: int, rival: Rival, samples: list[Sample]) -> list[Drawn]:
        job, weights = self._job, self._job.weights(cell)
        # no gradient comes back from a reward that is computed elsewhere
        get = self._load if rival.needs_gradients else self._reward
        named = dict(zip(job.basis, job.objectives, strict=True))
        reward = WeightedReward(
            {name: get(named[name]) for name in weights}, weights, dict(zip(job.basis, job.scales, strict=True))
        )
        try:
            found = search(rival, self._engine, samples, reward)
        except Exception as error:
            raise EvaluationError(f"rivals: {job.cells[cell].method} failed: {error}", "rivals") from error
        # the image that is kept was decoded for its score, or is decoded once more
        return [Drawn(one.latents, one.cost.rows, max(1, one.cost.decodes), one.cost.gradients) for one in found]

    def _decode(
        self, cell: int, samples: Sequence[Sample], drawn: Sequence[Drawn]
    ) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """Images [B, 3, H, W] in [0, 1], grey where a rival failed, and where it did [B]."""
        rival, model = self._job.rival(cell), self._engine.model
        latents = {place: one.latents for place, one in enumerate(drawn) if one.latents is not None}
        height, width = samples[0].height or model.default_height, samples[0].width or model.default_width
        images = torch.full((len(drawn), 3, height, width), torch.nan, device=model.device)
        if latents:
            images[list(latents)] = self._engine.decode(list(latents.values()))
        if rival is None or not rival.may_fail:
            return images, np.zeros(len(drawn), dtype=bool)
        sound = images.isfinite().flatten(1).all(1)
        return torch.where(sound.view(-1, 1, 1, 1), images, GREY), ~sound.cpu().numpy()

    def _columns(
        self, item: Item, images: torch.Tensor, failed: NDArray[np.bool_], prompts: list[str]
    ) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        waits = {name: self._start(name, images, prompts) for name in self._job.rewards}
        for name, wait in waits.items():
            with _naming(name, prompts):
                values = wait().numpy().astype(np.float64)
            if not np.isfinite(values).all():
                raise EvaluationError(f"rewards: {name} gave {values} for {len(prompts)} images", "rewards")
            columns[score_column(self._job, name)] = values.tolist()
        array, seeds = images.detach().cpu().numpy(), len(item.seeds)
        groups = [slice(start, start + seeds) for start in range(0, len(array), seeds)]
        spread = [without_failures(diversity, array[group], failed[group]) for group in groups]
        columns["diversity"] = np.concatenate(spread).tolist()
        return columns | (judge_images(images, prompts) if self._job.config.judge else {})

    def _start(self, name: str, images: torch.Tensor, prompts: list[str]) -> Callable[[], torch.Tensor]:
        with _naming(name, prompts):
            return start_scoring(self._reward(name), images, prompts)


def _drawn(output: Output, rival: Rival | None) -> Drawn:
    """What the engine made; EvaluationError for an error that is no finding about a rival."""
    if output.latents is None:
        if rival is not None and rival.may_fail and isinstance(output.error, DenoisingError):
            return Drawn(None, output.rows)
        raise EvaluationError(f"generation failed: {output.error}") from output.error
    kl = None if output.path_kl is None else output.path_kl * output.latents.numel()
    return Drawn(output.latents, output.rows, path_kl=kl)


def open_engine(job: Job, device: str) -> BlendEngine:
    """The bundle's engine with the oracles' adapters beside its own."""
    more = {oracle.name: oracle.path for oracle in job.oracles.values()}
    return load_engine(replace(job.bundle, adapters={**job.bundle.adapters, **more}), device=device)


def company(seeds: Sequence[int]) -> str:
    """The seeds that a sample's diversity was measured among, as the ledger writes them."""
    return " ".join(map(str, seeds))


def score_column(job: Job, reward: str) -> str:
    """The ledger's column of a reward."""
    return f"{reward}@{job.rewards[reward]}"


def _png(image: torch.Tensor) -> bytes:
    """An image [3, H, W] in [0, 1] as PNG."""
    pixels: NDArray[np.uint8] = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


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
