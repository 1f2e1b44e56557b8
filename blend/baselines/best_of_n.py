"""Best-of-N: draw N images under N seeds and keep the one of the highest reward.

x* = argmax_n r(x^n), x^n ~ p independent. Its KL to p, the model it draws from, is at most
log N - (N - 1) / N (arXiv 2401.01879).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from blend.baselines.found import Cost, Found, candidate_seeds, check_count, failure, score_images
from blend.courses import plot_course
from blend.engine import BlendEngine, Output, Sample
from blend.plans import plan_rows
from blend.rewards import Reward


def best_of_n(engine: BlendEngine, samples: Sequence[Sample], reward: Reward, n: int) -> list[Found]:
    """Return for each sample the best of n images, its own seed's among them.

    All candidates run through the engine together, under the sample's own preference: Preference.base() for the usual
    rival, any other to search over a blend. A sample none of whose candidates is finite has an error in place of
    latents. Raises what engine.run raises, and ValueError for n < 1.
    """
    check_count(n, "n")
    candidates = [replace(sample, seed=seed) for sample in samples for seed in candidate_seeds(sample.seed, n)]
    outputs = engine.run(candidates)
    return [_best(engine, outputs[start : start + n], reward) for start in range(0, len(outputs), n)]


def copies_within(engine: BlendEngine, sample: Sample, rows: int) -> int:
    """Return how many images of a sample's plan a budget of UNet rows pays for; ValueError for less than one."""
    steps = len(plot_course(engine.model, sample.num_inference_steps, sample.solver).timesteps)
    measured = bool(sample.record if sample.measure_kl is None else sample.measure_kl)
    each = plan_rows(sample, engine.bank.names, steps, measured=measured).rows_until(steps)
    if rows < each:
        raise ValueError(f"rows is {rows}, but one image takes {each}: give at least those")
    return rows // each


def _best(engine: BlendEngine, outputs: Sequence[Output], reward: Reward) -> Found:
    latents = {place: output.latents for place, output in enumerate(outputs) if output.latents is not None}
    scores = torch.full((len(outputs),), -torch.inf)
    if latents:
        images = engine.decode(list(latents.values()))
        scores[list(latents)] = score_images(reward, images, [outputs[0].sample.prompt] * len(latents))
    best, error = int(scores.argmax()), failure(scores, outputs[0].sample.seed)
    cost = Cost(rows=sum(output.rows for output in outputs), decodes=len(latents))
    return Found(outputs[best].sample, None if error else latents[best], scores, cost, error)
