"""Gains image by image, how they differ, and shares of them with the seeds drawn anew too.

All prompts share the same few seeds, and what a picture gains here hangs more on its seed than on its prompt. An
interval over prompts is one for these seeds. Drawing prompts and seeds anew, each by itself, says what others may show:
the pigeonhole bootstrap of Owen (2007, Annals of Applied Statistics 1(2)), which errs on the wide side.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blend.metrics import Interval, paired_difference, resample_weights
from workers.evaluation import EvaluateConfig, load_evaluation
from workers.evaluation.shares import ratio

Array = NDArray[np.float64]


def read_images(directory: Path) -> pd.DataFrame:
    """The samples of an evaluation, rewards in the base's standard deviations."""
    samples = load_evaluation(directory, table="samples")
    scales = json.loads((directory / "summary.json").read_text())["scales"]
    return samples.assign(**{name: samples[name] / scale["sd"] for name, scale in scales.items()})


def gains_by_image(images: pd.DataFrame, weights: Mapping[str, float]) -> dict[str, Array]:
    """method -> weighted gain over the base [prompts, seeds] at this mix and lambda 1."""
    score = sum(weight * images[name] for name, weight in weights.items())
    mixes = images.filter(like="w_")
    wanted = [weights.get(name.removeprefix("w_"), 0.0) for name in mixes]
    fitting = (images["method"] == "base") | (
        np.isclose(mixes, wanted).all(axis=1) & (images["kl_lambda"] == 1) & (images["method"] != "adapter")
    )
    tables = {
        method: rows.pivot(index="prompt_index", columns="seed", values="score").to_numpy()
        for method, rows in images.assign(score=score)[fitting].groupby("method")
    }
    return {method: table - tables["base"] for method, table in tables.items() if method != "base"}


def difference(mine: Array, other: Array, config: EvaluateConfig) -> Interval:
    """How much more is gained than by others on the same images [prompts, seeds], over prompts drawn anew."""
    return paired_difference(
        mine.mean(axis=1),
        other.mean(axis=1),
        np.random.default_rng(config.bootstrap_seed),
        resamples=config.resamples,
        level=config.confidence,
    )


def share_over_seeds(mine: Array, whole: Array, config: EvaluateConfig) -> Interval:
    """Share that gains [prompts, seeds] are of others, over prompts and seeds drawn anew."""
    generator = np.random.default_rng(config.bootstrap_seed)
    prompts, seeds = (resample_weights(count, config.resamples, generator) for count in whole.shape)
    draws, whole_draws = (np.einsum("rp,ps,rs->r", prompts, gains, seeds, optimize=True) for gains in (mine, whole))
    return ratio(mine.mean(), draws, whole.mean(), whole_draws, config.confidence)
