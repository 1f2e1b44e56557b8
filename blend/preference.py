"""What a person wants from a blend: weights over the basis, a KL dial and a method; all validation lives here.

Knows no tensors: it turns w and lambda into the one coefficient vector over {base, *basis} from which every
method starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Self

from pydantic import BaseModel, model_validator

METHODS = ("mpa", "ls", "soup", "cached", "staged")
KL_LAMBDA_RANGE = (0.0, 3.0)
SUM_TOLERANCE = 1e-6


class PreferenceError(ValueError):
    """A preference that cannot be served.

    `param` names the field as a client wrote it: "weights", "weights.<name>", "kl_lambda" or "method".
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[PreferenceError], tuple[str, str]]:
        return type(self), (str(self), self.param)


class Preference(BaseModel, frozen=True, extra="forbid"):
    """Weights w over basis adapters, the KL dial lambda and the blending method.

    lambda 0 is the base model, 1 the tuned blend, above 1 extrapolates past it (DB-KLA, arXiv 2505.18547).
    """

    weights: dict[str, float]  # basis name -> w_i >= 0, summing to 1; empty only for the base model alone
    kl_lambda: float = 1.0  # in KL_LAMBDA_RANGE; at most 1 for "ls"
    method: str = "mpa"  # one of METHODS

    @model_validator(mode="after")
    def _validate(self) -> Self:
        _check_method(self.method)
        _check_lambda(self.kl_lambda, self.method)
        _check_weights(self.weights, self.kl_lambda)
        return self

    @classmethod
    def base(cls) -> Preference:
        """Return the preference for the untouched base model."""
        return cls(weights={}, kl_lambda=0.0)

    @classmethod
    def parse(
        cls,
        weights: Mapping[str, float],
        kl_lambda: float = 1.0,
        method: str = "mpa",
        *,
        basis: Sequence[str],
        normalize: bool = False,
    ) -> Preference:
        """Return a checked preference over every name of `basis`; names left out count as 0.

        normalize=True divides by the sum, and only then may the weights sum to something else than 1.
        Raises PreferenceError for unknown names, values that are not finite numbers >= 0, weights that are
        all zero or do not sum to 1 (within 1e-6), kl_lambda out of range, an unknown method, or method "ls"
        with kl_lambda > 1.
        """
        if not isinstance(weights, Mapping):
            raise PreferenceError(f"weights must map basis names to numbers, not {weights!r}", "weights")
        for name in weights:
            if name not in basis:
                raise _unknown(name, basis)
        numbers = {name: _number(weights.get(name, 0.0), f"weights.{name}") for name in basis}
        for name, value in numbers.items():
            _check_weight(name, value)
        _check_method(method)
        kl_lambda = _number(kl_lambda, "kl_lambda")
        _check_lambda(kl_lambda, method)
        if normalize:
            total = math.fsum(numbers.values())
            _check_some(numbers, total)
            numbers = {name: value / total for name, value in numbers.items()}
        _check_weights(numbers, kl_lambda)
        return cls(weights=numbers, kl_lambda=kl_lambda, method=method)

    def coefficients(self, basis: Sequence[str]) -> tuple[float, ...]:
        """Return c over (base, *basis): c_base = 1 - lambda, c_i = lambda w_i; c sums to 1.

        This is eps = eps_base + lambda sum_i w_i (eps_i - eps_base), all adapters tuned at one KL strength.
        Raises PreferenceError when a weight names an adapter outside `basis`.
        """
        for name in self.weights:
            if name not in basis:
                raise _unknown(name, basis)
        tuned = (self.kl_lambda * self.weights.get(name, 0.0) for name in basis)
        return (1.0 - self.kl_lambda, *tuned)


def _unknown(name: object, basis: Sequence[str]) -> PreferenceError:
    return PreferenceError(f"unknown basis name {name!r}: use one of {', '.join(basis) or '(none)'}", f"weights.{name}")


def _number(value: object, param: str) -> float:
    # bool is a Real, but True is never meant as the weight 1.0
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PreferenceError(f"{param} must be a number, not {value!r}", param)
    return float(value)


def _check_weight(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise PreferenceError(f"weights.{name} is {value}: use a finite number >= 0", f"weights.{name}")


def _check_some(weights: Mapping[str, float], total: float) -> None:
    if total <= 0:
        raise PreferenceError(
            f"weights over {', '.join(weights) or '(no names)'} are all zero: give at least one a positive value"
            " (the base model alone is kl_lambda 0)",
            "weights",
        )


def _check_weights(weights: Mapping[str, float], kl_lambda: float) -> None:
    for name, value in weights.items():
        _check_weight(name, value)
    if not weights and kl_lambda == 0:
        return
    total = math.fsum(weights.values())
    _check_some(weights, total)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise PreferenceError(
            f"weights sum to {total:g}: they must sum to 1; divide each by {total:g} or ask for normalisation",
            "weights",
        )


def _check_method(method: object) -> None:
    if method not in METHODS:
        raise PreferenceError(f"unknown method {method!r}: use one of {', '.join(METHODS)}", "method")


def _check_lambda(kl_lambda: float, method: str) -> None:
    low, high = KL_LAMBDA_RANGE
    if not low <= kl_lambda <= high:
        raise PreferenceError(f"kl_lambda is {kl_lambda}: use a number from {low:g} to {high:g}", "kl_lambda")
    if method == "ls" and kl_lambda > 1:
        raise PreferenceError(
            f"kl_lambda is {kl_lambda}: method ls draws one adapter per step and cannot extrapolate;"
            " use kl_lambda <= 1, or method mpa or soup",
            "kl_lambda",
        )
