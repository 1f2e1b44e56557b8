"""Which cells (method x preference) an evaluation measures: each distinct one once.

A lambda of 0 is the base whatever the method and weights, and one adapter at full strength is that adapter
whatever the method; both are measured once and belong to every method's curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from blend.preference import METHODS, Preference, PreferenceError
from workers.evaluation.config import EvaluateConfig, EvaluationError

BASE = "base"
ADAPTER = "adapter"
ORACLE = "oracle"
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Cell:
    """A method at a preference: weights [K] in basis order, summing to 1 (all 0 for the base).

    The method is one of the engine's, BASE, ADAPTER, the name of a rival, or ORACLE: a model retrained for just this.
    """

    method: str
    weights: tuple[float, ...]
    kl_lambda: float

    def preference(self, basis: Sequence[str]) -> Preference:
        """What the engine is asked for; for a rival or an oracle, the blend that stands in for it."""
        if self.method == BASE:
            return Preference.base()
        named = dict(zip(basis, self.weights, strict=True))
        method = self.method if self.method in METHODS else "mpa"
        return Preference.parse(named, kl_lambda=self.kl_lambda, method=method, basis=basis)

    @property
    def active(self) -> tuple[int, ...]:
        """Positions of the adapters with a weight above 0."""
        return tuple(index for index, weight in enumerate(self.weights) if weight > 0)


def plan_cells(config: EvaluateConfig, basis: Sequence[str]) -> list[Cell]:
    """All distinct cells, base first, then each adapter, the blends method by method, the rivals and the oracles.

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
    cells += _rival_cells(config, basis, preferences)
    cells += _oracle_cells(config, basis)
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
    if config.equal_weights:
        yield equal_weights(count)
    yield from _explicit("weights", config.weights, basis)
    yield from _explicit("oracle_weights", config.oracle_weights, basis)


def _explicit(key: str, given: Sequence[dict[str, float]], basis: Sequence[str]) -> Iterator[tuple[float, ...]]:
    for position, weights in enumerate(given):
        try:
            preference = Preference.parse(weights, basis=basis)
        except PreferenceError as error:
            raise EvaluationError(f"{key}[{position}]: {error}", f"{key}[{position}]") from None
        yield _rounded([preference.weights.get(name, 0.0) for name in basis])


def _rival_cells(
    config: EvaluateConfig, basis: Sequence[str], preferences: Sequence[tuple[float, ...]]
) -> Iterator[Cell]:
    asked = tuple(_explicit("oracle_weights", config.oracle_weights, basis))
    mixes = preferences if config.rivals_everywhere or not asked else asked
    for rival in config.rivals:
        yield from (Cell(rival, weights, 1.0) for weights in mixes if max(weights) < 1)


def _oracle_cells(config: EvaluateConfig, basis: Sequence[str]) -> Iterator[Cell]:
    """The oracles, each strength of a single adapter together with the blends that stand in for it."""
    for position, weights in enumerate(_explicit("oracle_weights", config.oracle_weights, basis)):
        if max(weights) == 1:
            key = f"oracle_weights[{position}]"
            raise EvaluationError(f"{key}: one reward alone is what its adapter was tuned for; give a mix", key)
        yield Cell(ORACLE, weights, 1.0)
    for name, strengths in config.oracle_lambdas.items():
        if name not in basis:
            raise EvaluationError(
                f"oracle_lambdas: unknown adapter {name!r}; this bundle has {', '.join(basis)}", "oracle_lambdas"
            )
        weights = _one_hot(basis.index(name), len(basis))
        for strength in strengths:
            yield Cell("mpa", weights, strength)
            yield Cell(ORACLE, weights, strength)


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
