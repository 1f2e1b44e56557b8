"""Best-of-N and the reward that rivals maximise: what they keep, what they cost, what they refuse."""

from __future__ import annotations

import pytest
import torch
from work_counter import counted

from blend.adapters import AdapterBank
from blend.baselines import WeightedReward, best_of_n, copies_within
from blend.baselines.found import candidate_seeds, failure, score_images
from blend.engine import BlendEngine, Sample
from blend.model import DiffusionModel
from blend.preference import Preference
from blend.rewards import RewardError, load_reward

PROMPT = "A red colored car."


def base(seed: int = 3, **fields) -> Sample:
    return Sample(PROMPT, Preference.base(), seed, **{"num_inference_steps": 3, **fields})


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


def test_one_candidate_is_the_sample_itself(engine, redness):
    (found,) = best_of_n(engine, [base()], redness, 1)
    assert torch.equal(found.latents, engine.run([base()])[0].latents)
    assert found.sample == base()


def test_the_best_is_the_maximum_over_its_seeds_and_never_below_the_first(engine, redness):
    found = best_of_n(engine, [base(3), base(4)], redness, 3)
    for seed, one in zip((3, 4), found, strict=True):
        seeds = candidate_seeds(seed, 3)
        alone = [engine.run([base(candidate)])[0].latents for candidate in seeds]
        scores = redness(engine.decode(alone), [PROMPT] * 3)
        torch.testing.assert_close(one.scores, scores, rtol=0, atol=1e-5)
        assert one.score == one.scores.max() >= one.scores[0]
        assert one.sample.seed == seeds[int(scores.argmax())]
        torch.testing.assert_close(one.latents, alone[int(scores.argmax())], rtol=1e-5, atol=1e-4)


def test_the_stated_cost_is_what_ran(engine, tiny_model, redness):
    with counted(tiny_model) as seen:
        found = best_of_n(engine, [base(3), base(4)], redness, 3)
    assert sum(one.cost.rows for one in found) == seen["rows"] == 2 * 3 * 2 * 3
    assert sum(one.cost.decodes for one in found) == seen["decodes"] == 2 * 3


def test_a_budget_of_rows_buys_what_the_blend_costs(engine):
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    blend = Sample(PROMPT, Preference.parse(weights, basis=("a", "b", "c")), 3, num_inference_steps=3)
    rows = engine.run([blend])[0].rows
    assert copies_within(engine, base(), rows) == 3
    assert copies_within(engine, base(), rows - 1) == 2
    with pytest.raises(ValueError, match="one image takes 6"):
        copies_within(engine, base(), 5)


def test_candidates_depend_on_their_own_seed_and_place_alone():
    assert candidate_seeds(3, 4)[:2] == candidate_seeds(3, 2)
    assert candidate_seeds(3, 1) == [3]
    assert len({*candidate_seeds(3, 50), *candidate_seeds(4, 50)}) == 100


@pytest.mark.parametrize("n", [0, -1, True, 2.0])
def test_a_number_of_candidates_that_is_none_is_refused(engine, redness, n):
    with pytest.raises(ValueError, match="n is"):
        best_of_n(engine, [base()], redness, n)


def test_what_is_not_finite_never_wins(redness):
    images = torch.full((3, 3, 4, 4), 0.5)
    images[0, 0] = torch.nan
    scores = score_images(redness, images, [PROMPT] * 3)
    assert int(scores.argmax()) == 1
    assert failure(scores, seed=3) is None
    assert "seed 3" in str(failure(torch.full((2,), -torch.inf), seed=3))


def test_a_sample_without_a_finite_candidate_has_an_error_in_place_of_latents(engine, redness):
    (found,) = best_of_n(engine, [base(guidance_scale=1e38)], redness, 2)
    assert found.latents is None
    assert found.score != found.score
    assert "seed 3" in str(found.error)


def weighted(weights: dict[str, float], **scales: tuple[float, float]) -> WeightedReward:
    names = ("brightness", "colourfulness", "compressibility")
    known = {"brightness": (0.5, 0.1), "colourfulness": (0.4, 0.2), "compressibility": (-2.0, 0.5)}
    return WeightedReward({name: load_reward(name) for name in names}, weights, {**known, **scales})


def test_the_weighted_reward_counts_each_in_its_own_standard_deviations():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPT] * 3
    expected = 0.3 * (load_reward("brightness")(images, prompts) - 0.5) / 0.1
    expected += 0.7 * (load_reward("compressibility")(images, prompts) + 2.0) / 0.5
    reward = weighted({"brightness": 0.3, "compressibility": 0.7, "colourfulness": 0.0})
    torch.testing.assert_close(reward(images, prompts), expected)
    torch.testing.assert_close(reward(images[:1], prompts[:1]), expected[:1])
    assert reward.range == (-float("inf"), pytest.approx(0.3 * 3.3 + 0.7 * 4.0))


def test_the_weighted_reward_knows_what_has_no_gradient():
    assert weighted({"brightness": 0.3, "colourfulness": 0.7}).differentiable
    mixed = weighted({"brightness": 0.3, "compressibility": 0.7})
    assert not mixed.differentiable
    assert mixed.undifferentiable == ["compressibility"]


@pytest.mark.parametrize(
    ("weights", "scales", "message"),
    [
        ({"brightness": 0.0}, {}, "nothing to score"),
        ({"brightness": 1.0, "colourfulness": -1.0}, {}, r"weights\.colourfulness is -1"),
        ({"alignment": 1.0}, {}, "'alignment' has a weight but no reward"),
        ({"brightness": 1.0}, {"brightness": (0.5, 0.0)}, "scale of brightness"),
    ],
)
def test_a_weighted_reward_that_cannot_be_is_refused(weights, scales, message):
    with pytest.raises(RewardError, match=message):
        weighted(weights, **scales)
