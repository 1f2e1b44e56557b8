"""Row planners: what each method costs, and what it equals when its budget is that of the blend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.mixing import sigma_points
from blend.model import DiffusionModel
from blend.plans import Plan, plan_rows
from blend.preference import METHODS, Preference

BASIS = ("a", "b", "c")
MIX = {"a": 0.5, "b": 0.3, "c": 0.2}


def sample(method: str = "mpa", kl_lambda: float = 1.0, weights: dict[str, float] = MIX, **options) -> Sample:
    preference = Preference.parse(weights, kl_lambda, method, basis=BASIS)
    return Sample("a cat", preference, **{"seed": 3, "num_inference_steps": 6, **options})


def plan(steps: int = 20, *, measured: bool = False, **options) -> Plan:
    return plan_rows(sample(**options), BASIS, steps, measured=measured)


def rows_per_step(planned: Plan) -> list[int]:
    return [len(step.conditional) for step in planned.steps]


def latents(model: DiffusionModel, bank: AdapterBank, *samples: Sample) -> list[torch.Tensor]:
    outputs = BlendEngine(model, bank).run(samples)
    assert all(output.error is None for output in outputs)
    return [output.latents for output in outputs]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"method": "mpa"}, 6),
        ({"method": "mpa", "kl_lambda": 0.5}, 8),
        ({"method": "mpa", "shared_unconditional": True}, 4),
        ({"method": "mpa", "guidance_scale": 1.0}, 3),
        ({"method": "mpa", "guidance_scale": 0.0}, 3),
        ({"method": "mpa", "weights": {"a": 1.0}}, 2),
        ({"method": "ls"}, 2),
        ({"method": "soup"}, 2),
        ({"method": "soup", "kl_lambda": 0.0}, 2),
    ],
    ids=str,
)
def test_rows_of_a_step(options, rows):
    assert rows_per_step(plan(**options)) == [rows] * 20


def test_cached_refreshes_every_k_steps():
    planned = plan(7, method="cached", refresh_every=3)
    assert rows_per_step(planned) == [8, 2, 2, 8, 2, 2, 8]
    assert planned.peak_rows == 8
    assert [planned.rows_until(step) for step in (0, 1, 4, 7)] == [0, 8, 20, 32]


@given(
    steps=st.integers(1, 60),
    budget=st.floats(1, 3.5),
    guidance=st.sampled_from([0.0, 1.0, 3.0]),
    kl_lambda=st.sampled_from([0.3, 1.0, 1.5]),
)
def test_staged_stays_within_its_budget(steps, budget, guidance, kl_lambda):
    planned = plan(steps, method="staged", row_budget=budget, guidance_scale=guidance, kl_lambda=kl_lambda)
    sides = 2 if guidance == 3.0 else 1
    assert planned.rows_until(steps) <= budget * sides * steps + 1e-6
    exact = [step for step in planned.steps if len(step.conditional) > sides]
    assert list(planned.steps[: len(exact)]) == exact  # the first steps are the exact ones


@pytest.mark.parametrize(("steps", "exact"), [(10, 1), (20, 2), (50, 5)])
def test_staged_pays_for_its_exact_steps_with_reused_guidance(steps, exact):
    rows = rows_per_step(plan(steps, method="staged"))
    assert sum(rows) == 2 * steps
    assert rows[:exact] == [6] * exact
    assert rows[-1] == 2
    assert rows.count(1) == 4 * exact


@pytest.mark.parametrize("kl_lambda", [0.4, 1.0, 1.5])
@pytest.mark.parametrize(
    "exact",
    [{"method": "staged", "row_budget": 4.0}, {"method": "cached", "refresh_every": 1}],
    ids=["staged", "cached"],
)
def test_a_full_budget_is_the_blend(tiny_model, tiny_bank, exact, kl_lambda):
    ours, blend = latents(tiny_model, tiny_bank, sample(kl_lambda=kl_lambda, **exact), sample(kl_lambda=kl_lambda))
    torch.testing.assert_close(ours, blend, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_is_itself_under_every_method(tiny_model, tiny_bank, method):
    options = {"weights": {"b": 1.0}, "row_budget": 2.0}
    ours, alone = latents(tiny_model, tiny_bank, sample(method, **options), sample(weights={"b": 1.0}))
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_measured_kl_does_not_change_the_sample(tiny_model, tiny_bank, method):
    plain = sample(method, kl_lambda=0.5, row_budget=1.5)
    one, other = latents(tiny_model, tiny_bank, plain, replace(plain, measure_kl=True))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_base_rows_are_planned_for_a_measured_kl(method):
    planned = plan(12, method=method, kl_lambda=0.7, measured=True)
    for step in planned.steps:
        base = step.base_coefficients != 0
        assert step.base_coefficients.sum() == pytest.approx(1)
        assert not step.mixes[base].any()


def test_cached_equals_the_blend_when_merging_is_exact(tiny_model, tiny_bank):
    # with one adapter at lambda 0.5 the residual is not zero, so the reuse shows
    ours = sample("cached", kl_lambda=0.5, refresh_every=2)
    exact = replace(ours, preference=sample(kl_lambda=0.5).preference)
    merged = replace(ours, preference=sample("soup", kl_lambda=0.5).preference)
    cached, blend, soup = latents(tiny_model, tiny_bank, ours, exact, merged)
    assert 0 < (cached - blend).norm() < (soup - blend).norm()


def test_guidance_acts_inside_its_interval_alone():
    planned = plan(10, guidance_interval=(0.2, 0.5))
    assert rows_per_step(planned) == [3, 3, 6, 6, 6, 3, 3, 3, 3, 3]
    off = planned.steps[0]
    assert all(off.conditional)
    assert off.coefficients.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_an_interval_of_all_steps_changes_nothing_and_one_of_none_is_no_guidance(tiny_model, tiny_bank):
    plain = sample()
    full, default, brief, off = latents(
        tiny_model,
        tiny_bank,
        replace(plain, guidance_interval=(0, 1)),
        plain,
        replace(plain, guidance_interval=(0.99, 1)),
        replace(plain, guidance_scale=1.0),
    )
    assert torch.equal(full, default)
    torch.testing.assert_close(brief, off, rtol=0, atol=1e-5)


def test_shared_unconditional_rows_are_those_of_the_merged_adapters():
    step = plan(1, shared_unconditional=True, guidance_scale=3.0, kl_lambda=0.5).steps[0]
    unconditional = [not seen for seen in step.conditional]
    assert step.mixes[unconditional].tolist() == [pytest.approx([0.25, 0.15, 0.1])]
    assert step.coefficients[unconditional].tolist() == pytest.approx([-2.0])


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 1.0]))
def test_sigma_points_have_the_moments_of_the_draws(raw, amplitude):
    weights = [value / math.fsum(raw) for value in raw]
    points = torch.tensor(sigma_points(weights, amplitude), dtype=torch.float64)
    w = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(points.mean(0), w, rtol=0, atol=1e-9)
    spread = (points - w).T @ (points - w) / len(weights)
    torch.testing.assert_close(spread, amplitude**2 * (w.diag() - w.outer(w)), rtol=0, atol=1e-9)


def test_sigma_points_of_equal_weights_are_the_sources():
    assert torch.tensor(sigma_points([1 / 3] * 3, 1.0)).allclose(torch.eye(3), atol=1e-6)
