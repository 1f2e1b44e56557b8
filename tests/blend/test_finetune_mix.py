"""Tuning toward a mix of rewards: its scales are the base's, one reward alone is that reward, and it resumes."""

import io

import pytest
import torch

from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError
from blend.finetune.loop import run_training
from blend.rewards import RewardError, load_reward, start_scoring
from blend.rewards.weighted import WeightedReward

MIX = {"colourfulness": 0.25, "brightness": 0.75}
PROMPTS = ["A red colored car."] * 4


def mix_of(weights):
    return WeightedReward({name: load_reward(name) for name in weights}, weights, dict.fromkeys(weights, (0.0, 1.0)))


def run(trainer):
    run_training(trainer, save=lambda trainer: None)
    return trainer


def test_a_mix_counts_each_reward_in_the_deviations_of_the_base(make_trainer):
    trainer = make_trainer(mix_of(MIX), reward=MIX, iterations=1)
    metrics = trainer.evaluate()
    parts = metrics["watched"]
    assert trainer.scales == {
        name: (pytest.approx(parts[name]["mean"]), pytest.approx(parts[name]["std"])) for name in MIX
    }
    assert metrics["held_out_mean"] == pytest.approx(0, abs=1e-5)
    # advantages are not divided by the mix's own deviation, which is smaller the more its parts disagree
    assert trainer.base == (0.0, 1.0)
    scored = trainer.sampler.evaluate(trainer.held_out)
    expected = sum(MIX[name] * (scored.watched[name] - mean) / std for name, (mean, std) in trainer.scales.items())
    torch.testing.assert_close(scored.rewards, expected, rtol=1e-4, atol=1e-4)


def test_a_mix_of_one_reward_trains_the_adapter_of_that_reward(make_trainer):
    alone = run(make_trainer(reward="colourfulness", iterations=2))
    mixed = run(make_trainer(mix_of({"colourfulness": 1.0}), reward={"colourfulness": 1.0}, iterations=2))
    for one, other in zip(alone.parameters, mixed.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_mix_goes_on_from_a_checkpoint_with_its_scales(make_trainer):
    straight = run(make_trainer(mix_of(MIX), reward=MIX, iterations=3))
    first = run(make_trainer(mix_of(MIX), reward=MIX, iterations=2))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = make_trainer(mix_of(MIX), reward=MIX, iterations=3)
    second.load_state_dict(torch.load(saved, weights_only=True))
    run(second)
    for one, other in zip(straight.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)


def test_a_weighted_reward_answers_alike_now_and_later():
    reward = mix_of(MIX).rescaled({"colourfulness": (0.6, 0.2), "brightness": (0.5, 0.1)})
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(start_scoring(reward, images, PROMPTS)(), reward(images, PROMPTS))


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({}, "empty mix"),
        ({"colourfulness": -1.0}, "reward"),
        ({"alignment": 0.5, "colourfulness": 0.5}, "guard.watch names 'alignment'"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(reward, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig.parse({"name": "x", "reward": reward, "guard": {"watch": {"alignment": 1.0}}})


def test_unknown_parts_are_named():
    with pytest.raises(RewardError, match="beauty"):
        WeightedReward({}, {"beauty": 1.0}, {})
    assert TrainConfig.parse({"name": "x", "reward": MIX}).reward_label == "0.25 colourfulness + 0.75 brightness"
