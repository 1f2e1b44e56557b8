"""Measures of an evaluation: Pareto front, hypervolume, distance to a front, bootstrap intervals, diversity.

All objectives are maximised. Knows nothing of models, preferences or tables: arrays in, numbers out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class MetricError(ValueError):
    """Values that no measure can be taken of (wrong shape, not finite, empty)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """True when the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def _finite(name: str, values: ArrayLike, ndim: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise MetricError(f"{name} has shape {array.shape}; it must have {ndim} non-empty dimensions")
    if not np.isfinite(array).all():
        raise MetricError(f"{name} holds NaN or infinite values; score the samples again or drop them")
    return array


def pareto_mask(points: ArrayLike) -> NDArray[np.bool_]:
    """Which of the points [N, K] no other point dominates, [N]; of equal points all are kept."""
    array = _finite("points", points, 2)
    if array.shape[1] == 1:
        return np.asarray(array[:, 0] == array[:, 0].max())
    return np.asarray(moocore.is_nondominated(array, maximise=True, keep_weakly=True), dtype=bool)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that the points [N, K] dominate above the reference [K], in the product of the axes' units.

    Points that do not exceed the reference in every objective add nothing.
    """
    array, ref = _finite("points", points, 2), _finite("reference", reference, 1)
    if len(ref) != array.shape[1]:
        raise MetricError(f"reference has {len(ref)} objectives, the points have {array.shape[1]}")
    if array.shape[1] == 1:
        return float(max(0.0, array.max() - ref[0]))
    return float(moocore.hypervolume(array, ref=ref, maximise=True))


def igd_plus(points: ArrayLike, reference: ArrayLike) -> float:
    """Mean over the reference points [M, K] of how far the nearest of the points [N, K] falls short of each (IGD+).

    Falling short is the length of max(reference - point, 0), so what is better in an objective costs nothing: 0 where
    every reference point is equalled or beaten, and never less. In the axes' common unit. Ishibuchi et al., Modified
    distance calculation in generational distance and inverted generational distance, EMO 2015.
    """
    array, goal = _finite("points", points, 2), _finite("reference", reference, 2)
    if goal.shape[1] != array.shape[1]:
        raise MetricError(f"reference has {goal.shape[1]} objectives, the points have {array.shape[1]}")
    return float(moocore.igd_plus(array, ref=goal, maximise=True))


def resample_weights(n: int, resamples: int, generator: np.random.Generator) -> Array:
    """Bootstrap draws of n units as averaging weights [resamples, n], each row summing to 1.

    A statistic of means over units becomes one matrix product: `weights @ values`; using the same weights for
    two series is what makes their difference a paired one.
    """
    if n < 1 or resamples < 1:
        raise MetricError(f"n = {n} and resamples = {resamples} must both be at least 1")
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples) / n


def interval(estimate: float, draws: ArrayLike, level: float = 0.95) -> Interval:
    """The central `level` of bootstrap draws [resamples] around the estimate of the full data."""
    if not 0 < level < 1:
        raise MetricError(f"level = {level} must lie between 0 and 1, for example 0.95")
    tail = (1 - level) / 2
    low, high = np.quantile(_finite("draws", draws, 1), [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def bootstrap_mean(
    values: ArrayLike, generator: np.random.Generator, *, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Mean of values [n] with a percentile interval; pass one value per independent unit (one per prompt)."""
    array = _finite("values", values, 1)
    draws = resample_weights(len(array), resamples, generator) @ array
    return interval(float(array.mean()), draws, level)


def paired_difference(
    values: ArrayLike,
    baseline: ArrayLike,
    generator: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean of values - baseline, both [n] and measured on the same units, with a percentile interval."""
    first, second = _finite("values", values, 1), _finite("baseline", baseline, 1)
    if len(first) != len(second):
        raise MetricError(f"a paired difference needs equal lengths, not {len(first)} and {len(second)}")
    return bootstrap_mean(first - second, generator, resamples=resamples, level=level)


def diversity(images: ArrayLike) -> Array:
    """Each image's mean root-mean-square distance to the others, [N], for images [N, C, H, W] in [0, 1].

    The mean over N is the mean pairwise distance; identical images give 0. A single image has no others: NaN.
    """
    array = _finite("images", images, 4)
    count = len(array)
    if count == 1:
        return np.full(1, np.nan)
    flat = array.reshape(count, -1)
    total = np.zeros(count)
    for index in range(count):
        total[index] = np.sqrt(((flat - flat[index]) ** 2).mean(axis=1)).sum()
    return total / (count - 1)


def normalise(values: ArrayLike, centre: Sequence[float], scale: Sequence[float]) -> Array:
    """(values - centre) / scale over the last axis: rewards of unlike units in base standard deviations."""
    spread = _finite("scale", scale, 1)
    if (spread <= 0).any():
        raise MetricError(f"scale {spread.tolist()} must be positive: a reward that never varies cannot be compared")
    return (np.asarray(values, dtype=np.float64) - _finite("centre", centre, 1)) / spread
