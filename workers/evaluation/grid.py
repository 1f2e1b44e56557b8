"""Which cells (method x preference) an evaluation measures: each distinct one once.

A lambda of 0 is the base whatever the method and weights, and one adapter at full strength is that adapter
whatever the method; both are measured once and belong to every method's curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from blend.preference import Preference, PreferenceError
from workers.evaluation.config import EvaluateConfig, EvaluationError

BASE = "base"
ADAPTER = "adapter"
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Cell:
    """A method at a preference: weights [K] in basis order, summing to 1 (all 0 for the base)."""

    method: str
    weights: tuple[float, ...]
    kl_lambda: float

    def preference(self, basis: Sequence[str]) -> Preference:
        """What the engine is asked for."""
        if self.method == BASE:
            return Preference.base()
        named = dict(zip(basis, self.weights, strict=True))
        method = "mpa" if self.method == ADAPTER else self.method
        return Preference.parse(named, kl_lambda=self.kl_lambda, method=method, basis=basis)

    @property
    def active(self) -> tuple[int, ...]:
        """Positions of the adapters with a weight above 0."""
        return tuple(index for index, weight in enumerate(self.weights) if weight > 0)


def plan_cells(config: EvaluateConfig, basis: Sequence[str]) -> list[Cell]:
    """All distinct cells, base first, then each adapter, then the blends method by method.

    EvaluationError names the entry of the run file that this basis cannot serve.
    """
    if not basis:
        raise EvaluationError("the bundle has no adapters; evaluate one with at least one", "bundle")
    preferences = list(dict.fromkeys(_preferences(config, basis)))
    cells = [_canonical("mpa", preferences[0], 0.0)]
    cells += [_canonical("mpa", _one_hot(index, len(basis)), 1.0) for index in range(len(basis))]
    for method in config.methods:
        for weights in preferences:
            cells += [
                _canonical(method, weights, kl_lambda)
                for kl_lambda in _lambdas(config, method, weights)
                if method != "ls" or kl_lambda <= 1
            ]
    unique = list(dict.fromkeys(cells))
    for cell in unique:
        _check(cell, basis)
    return unique


def equal_weights(count: int) -> tuple[float, ...]:
    """The preference for everything alike, as it stands in a plan."""
    return _rounded([1.0] * count)


def _preferences(config: EvaluateConfig, basis: Sequence[str]) -> Iterator[tuple[float, ...]]:
    count = len(basis)
    yield from (_one_hot(index, count) for index in range(count))
    for first, second in combinations(range(count), 2):
        for share in config.pair_weights:
            weights = [0.0] * count
            weights[first], weights[second] = share, 1 - share
            yield _rounded(weights)
    yield from (_rounded(parts) for parts in _compositions(config.simplex_steps, count))
    yield equal_weights(count)
    yield from (_explicit(config, position, basis) for position in range(len(config.weights)))


def _explicit(config: EvaluateConfig, position: int, basis: Sequence[str]) -> tuple[float, ...]:
    try:
        preference = Preference.parse(config.weights[position], basis=basis)
    except PreferenceError as error:
        raise EvaluationError(f"weights[{position}]: {error}", f"weights[{position}]") from None
    return _rounded([preference.weights.get(name, 0.0) for name in basis])


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways of writing total as an ordered sum of so many parts; none for 0."""
    if total == 0:
        return
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        if first == total:
            yield (first, *[0] * (parts - 1))
        else:
            yield from ((first, *rest) for rest in _compositions(total - first, parts - 1))


def _lambdas(config: EvaluateConfig, method: str, weights: tuple[float, ...]) -> tuple[float, ...]:
    special = weights == equal_weights(len(weights)) or max(weights) == 1
    if method not in config.kl_methods or not (config.kl_everywhere or special):
        return (1.0,)
    return tuple(dict.fromkeys((1.0, *sorted(config.kl_lambdas))))


def _one_hot(index: int, count: int) -> tuple[float, ...]:
    return tuple(1.0 if position == index else 0.0 for position in range(count))


def _rounded(parts: Sequence[float]) -> tuple[float, ...]:
    """Scaled to sum to 1, and rounded so that 1 - 0.8 and 0.2 are one preference."""
    total = sum(parts)
    return tuple(round(part / total, _DIGITS) for part in parts)


def _canonical(method: str, weights: tuple[float, ...], kl_lambda: float) -> Cell:
    if kl_lambda == 0:
        return Cell(BASE, (0.0,) * len(weights), 0.0)
    if kl_lambda == 1 and max(weights) == 1:
        return Cell(ADAPTER, weights, 1.0)
    return Cell(method, weights, kl_lambda)


def _check(cell: Cell, basis: Sequence[str]) -> None:
    try:
        cell.preference(basis)
    except PreferenceError as error:
        key = {"kl_lambda": "kl_lambdas", "method": "methods"}.get(error.param, "weights")
        raise EvaluationError(f"{key}: {error}", key) from None
