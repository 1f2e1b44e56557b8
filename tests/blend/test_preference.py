"""Preferences: the coefficient vector, and an error for everything that is none."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from blend.preference import KL_LAMBDA_RANGE, METHODS, Preference, PreferenceError

BASIS = ("colour", "jpeg", "align")


@given(
    st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda w: sum(w) > 1e-3),
    st.floats(*KL_LAMBDA_RANGE),
    st.sampled_from(("mpa", "soup")),
)
def test_coefficients_follow_the_formula_and_sum_to_one(raw, kl_lambda, method):
    preference = Preference.parse(dict(zip(BASIS, raw, strict=True)), kl_lambda, method, basis=BASIS, normalize=True)
    coefficients = preference.coefficients(BASIS)
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-6)
    assert coefficients[0] == 1 - kl_lambda
    for value, weight in zip(coefficients[1:], raw, strict=True):
        assert value == pytest.approx(kl_lambda * weight / math.fsum(raw))


def test_coefficients_follow_the_order_of_the_basis():
    preference = Preference.parse({"jpeg": 0.25, "colour": 0.75}, 0.5, basis=BASIS)
    assert preference.weights == {"colour": 0.75, "jpeg": 0.25, "align": 0.0}
    assert preference.coefficients(BASIS) == (0.5, 0.375, 0.125, 0.0)
    assert preference.coefficients(tuple(reversed(BASIS))) == (0.5, 0.0, 0.125, 0.375)


def test_full_strength_has_no_base_coefficient_at_all():
    assert Preference.parse({"colour": 1.0}, basis=BASIS).coefficients(BASIS) == (0.0, 1.0, 0.0, 0.0)


def test_extrapolation_makes_the_base_negative():
    assert Preference.parse({"colour": 1.0}, 1.5, basis=BASIS).coefficients(BASIS)[0] == -0.5


def test_the_base_alone_needs_no_basis():
    assert Preference.base().coefficients(()) == (1.0,)
    assert Preference.base().coefficients(BASIS) == (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("weights", "options", "param", "words"),
    [
        ({"colr": 1.0}, {}, "weights.colr", ["'colr'", "colour, jpeg, align"]),
        ({"colour": -0.5, "jpeg": 1.5}, {}, "weights.colour", ["-0.5", ">= 0"]),
        ({"colour": float("nan")}, {}, "weights.colour", ["nan", "finite"]),
        ({"colour": float("inf")}, {}, "weights.colour", ["inf", "finite"]),
        ({"colour": "1"}, {}, "weights.colour", ["'1'", "number"]),
        ({"colour": True}, {}, "weights.colour", ["True", "number"]),
        ({"colour": 0.0}, {}, "weights", ["all zero"]),
        ({}, {}, "weights", ["all zero"]),
        ({}, {"normalize": True}, "weights", ["all zero"]),
        ({"colour": 0.5}, {}, "weights", ["0.5", "sum to 1"]),
        ({"colour": 0.5, "jpeg": 0.50001}, {}, "weights", ["sum to 1"]),
        ("colour", {}, "weights", ["'colour'"]),
        ({"colour": 1.0}, {"kl_lambda": -0.1}, "kl_lambda", ["-0.1", "0 to 3"]),
        ({"colour": 1.0}, {"kl_lambda": 3.1}, "kl_lambda", ["3.1", "0 to 3"]),
        ({"colour": 1.0}, {"kl_lambda": float("nan")}, "kl_lambda", ["nan", "0 to 3"]),
        ({"colour": 1.0}, {"kl_lambda": "1"}, "kl_lambda", ["'1'", "number"]),
        ({"colour": 1.0}, {"method": "average"}, "method", ["'average'", ", ".join(METHODS)]),
        ({"colour": 1.0}, {"method": "ls", "kl_lambda": 1.01}, "kl_lambda", ["1.01", "ls", "<= 1"]),
    ],
)
def test_bad_input_names_the_field_the_value_and_the_remedy(weights, options, param, words):
    with pytest.raises(PreferenceError) as caught:
        Preference.parse(weights, **options, basis=BASIS)
    assert caught.value.param == param
    for word in words:
        assert word in str(caught.value)


def test_weights_are_normalised_only_when_asked():
    assert Preference.parse({"colour": 3, "jpeg": 1}, basis=BASIS, normalize=True).weights["colour"] == 0.75
    with pytest.raises(PreferenceError):
        Preference.parse({"colour": 3, "jpeg": 1}, basis=BASIS)


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": {"a": 0.4}},
        {"weights": {"a": -1.0, "b": 2.0}},
        {"weights": {"a": 1.0}, "kl_lambda": 9},
        {"weights": {"a": 1.0}, "method": "x"},
        {"weights": {"a": 1.0}, "method": "ls", "kl_lambda": 2},
        {"weights": {}},
        {"weights": {"a": 1.0}, "lambda": 1.0},
    ],
)
def test_the_constructor_checks_too(fields):
    with pytest.raises(ValidationError):
        Preference(**fields)


def test_coefficients_refuse_a_weight_outside_the_basis():
    with pytest.raises(PreferenceError, match="'a'") as caught:
        Preference(weights={"a": 1.0}).coefficients(BASIS)
    assert caught.value.param == "weights.a"


def test_errors_survive_pickle():
    error = pickle.loads(pickle.dumps(PreferenceError("weights sum to 2", "weights")))
    assert (str(error), error.param) == ("weights sum to 2", "weights")
