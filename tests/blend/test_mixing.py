"""The blend of predictions, guidance, and the schedules of adapter sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blend.mixing import LS_KINDS, blend_predictions, draw_ls_schedule, guidance_coefficients, guide

weights_of = (
    st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any).map(lambda raw: [r / sum(raw) for r in raw])
)


def test_predictions_are_summed_per_sample():
    preds = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    coefficients = torch.tensor([0.5, 2.0, -1.0, 0.25, 1.0])
    blended = blend_predictions(preds, coefficients, torch.tensor([0, 1, 0, 1, 0]), 3)
    torch.testing.assert_close(blended[0], 0.5 * preds[0] - preds[2] + preds[4])
    torch.testing.assert_close(blended[1], 2 * preds[1] + 0.25 * preds[3])
    assert not blended[2].any()


def test_a_sum_does_not_depend_on_the_other_samples():
    generator = torch.Generator().manual_seed(1)
    preds, coefficients = torch.randn(6, 4, 8, 8, generator=generator), torch.randn(6, generator=generator)
    alone = blend_predictions(preds[:3], coefficients[:3], torch.zeros(3, dtype=torch.long), 1)
    mixed = blend_predictions(
        preds[[3, 0, 4, 1, 5, 2]], coefficients[[3, 0, 4, 1, 5, 2]], torch.tensor([0, 1, 0, 1, 0, 1]), 2
    )
    assert torch.equal(alone[0], mixed[1])


def test_half_precision_predictions_are_summed_in_float32():
    preds = torch.tensor([[2048.0], [1.0]], dtype=torch.float16)
    blended = blend_predictions(preds, torch.ones(2), torch.zeros(2, dtype=torch.long), 1)
    assert blended.dtype == torch.float32
    assert blended.item() == 2049.0


def test_gradients_flow_through_the_blend():
    preds = torch.randn(3, 2, requires_grad=True)
    blend_predictions(preds, torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0, 0, 1]), 2).sum().backward()
    assert torch.equal(preds.grad, torch.tensor([[0.5] * 2, [0.0] * 2, [2.0] * 2]))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_is_a_blend_of_two_rows(scale):
    uncond, text = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    c_uncond, c_text = guidance_coefficients(scale)
    torch.testing.assert_close(c_uncond * uncond + c_text * text, guide(uncond, text, scale), rtol=1e-5, atol=1e-5)


def test_guidance_takes_a_scale_per_row():
    uncond, text = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = guide(uncond, text, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(guided[0], text[0])
    torch.testing.assert_close(guided[1], uncond[1] + 4 * (text[1] - uncond[1]))


@given(weights_of, st.integers(0, 2**31), st.sampled_from(LS_KINDS))
def test_a_schedule_uses_only_sources_with_weight_and_is_reproducible(weights, seed, kind):
    schedule = draw_ls_schedule(weights, 17, seed, kind)
    assert len(schedule) == 17
    assert all(weights[source] > 0 for source in schedule)
    assert schedule == draw_ls_schedule(weights, 17, seed, kind)


@given(st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_two_sources_never_stray_by_a_whole_step(w, seed):
    schedule = draw_ls_schedule([w, 1 - w], 60, seed, "systematic")
    for i in range(61):
        assert abs(schedule[:i].count(0) - i * w) < 1 + 1e-9


@given(weights_of, st.integers(0, 2**31))
def test_many_sources_stay_close_to_their_share(weights, seed):
    schedule = draw_ls_schedule(weights, 60, seed, "systematic")
    for source, weight in enumerate(weights):
        for i in range(61):
            assert abs(schedule[:i].count(source) - i * weight) < 3


@pytest.mark.parametrize(("weights", "period"), [([0.5, 0.5], 2), ([1 / 3] * 3, 3), ([0.5, 0.25, 0.25], 4)])
def test_a_mirrored_schedule_walks_every_second_period_backwards(weights, period):
    for seed in range(20):
        forth = draw_ls_schedule(weights, 18, seed, "systematic")
        mirrored = draw_ls_schedule(weights, 18, seed, "mirrored")
        for start in range(0, 18, period):
            block = forth[start : start + period]
            expected = block[::-1] if start // period % 2 else block
            assert mirrored[start : start + period] == expected


@settings(max_examples=5)
@given(weights_of, st.sampled_from(LS_KINDS))
def test_the_marginals_at_every_step_are_the_weights(weights, kind):
    draws, steps = 2000, 6
    schedules = torch.tensor([draw_ls_schedule(weights, steps, seed, kind) for seed in range(draws)])
    for source, weight in enumerate(weights):
        frequency = (schedules == source).float().mean(0)
        # five standard errors at every one of the steps
        assert (frequency - weight).abs().max() <= 5 * math.sqrt(weight * (1 - weight) / draws) + 1e-9


def test_one_hot_weights_leave_no_choice():
    assert draw_ls_schedule([0.0, 1.0, 0.0], 9, 4) == [1] * 9


@pytest.mark.parametrize("weights", [[0.5, 0.4], [-0.5, 1.5], [float("nan"), 1.0], []])
def test_weights_that_are_no_distribution_are_refused(weights):
    with pytest.raises(ValueError, match="distribution"):
        draw_ls_schedule(weights, 4, 0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'sobol'.*mirrored, systematic, iid"):
        draw_ls_schedule([1.0], 4, 0, "sobol")
