"""What the held-out evaluation says of a run, and the weight of the KL that follows from it: pure functions."""

import math
import random
import re

import pytest
import torch

from blend.finetune.config import Guard, TrainConfig
from blend.finetune.held_out import best_within, broken_rule, owned_requests, published, sheet_row, summarise
from blend.finetune.kl_control import GAIN, LARGEST, KLControl
from blend.finetune.rollout import Scored, plan_held_out
from blend.finetune.workgroup import Workgroup


def line(iteration, mean=0.0, kl=0.0, **watched):
    return {
        "iteration": iteration,
        "held_out_mean": mean,
        "held_out_std": 0.5,
        "held_out_path_kl": kl,
        "watched": {name: {"mean": value, "std": 0.1, "ci": 0.0} for name, value in watched.items()},
    }


@pytest.mark.parametrize(
    ("guard", "latest", "expected"),
    [
        (Guard(), line(4, mean=-9.0, kl=1e6), None),
        (Guard(kl=10.0), line(4, kl=10.0), None),
        (Guard(kl=10.0), line(4, kl=10.5), r"path KL 10\.5 nats, above guard\.kl 10"),
        (Guard(drop=1.0), line(4, mean=0.5), None),  # one base deviation below the best, 1.0
        (Guard(drop=1.0), line(4, mean=0.4), r"1\.20 base deviations below its best, above guard\.drop 1"),
        (Guard(watch={"alignment": 2.0}), line(4, alignment=0.61), None),
        (Guard(watch={"alignment": 2.0}), line(4, alignment=0.5), r"alignment 3\.00 of its deviations below the base"),
    ],
)
def test_rules(guard, latest, expected):
    history = [line(0, alignment=0.8), line(2, mean=1.0, alignment=0.9), {"iteration": 3}, latest]
    if expected is None:
        assert broken_rule(guard, history) is None
    else:
        assert re.search(expected, broken_rule(guard, history))


def test_what_is_published_is_the_last_evaluation_or_the_kept_one():
    history = [line(0), line(2, mean=1.0), {"iteration": 3}, line(4, mean=2.0)]
    assert published(history)["iteration"] == 4
    assert published([*history[:-1], {**line(4), "kept_iteration": 2}])["iteration"] == 2


def test_the_best_is_the_highest_reward_that_keeps_the_budget():
    history = [line(0, mean=9.0), line(2, mean=1.0, kl=50.0), {"iteration": 3}, line(4, mean=3.0, kl=110.5)]
    history.append(line(6, mean=2.0, kl=109.5))
    assert best_within(history, 100.0) == 6  # a tenth above the budget is forgiven
    assert best_within(history, 60.0) == 2
    assert best_within(history, 10.0) is None
    assert best_within(history, None) == 4
    assert best_within(history[:1], None) is None


def test_watched_rewards_keep_their_own_moments_and_diversity_is_within_a_prompt():
    settings = {"name": "x", "reward": "brightness", "held_out_images": 5, "held_out_images_per_prompt": 2}
    config = TrainConfig.parse(settings)
    requests = plan_held_out(config, ["a", "b"])
    assert [(r.group, r.prompt) for r in requests] == [(0, "a"), (0, "a"), (1, "b"), (1, "b"), (2, "a")]
    assert len({r.seed for r in requests}) == 5
    # prompts differ by 0.9, images of one prompt by 0.1 and 0.3
    levels = torch.tensor([0.0, 0.1, 0.9, 0.6, 0.5])
    images = levels.view(5, 1, 1, 1).expand(5, 3, 2, 2)
    scored = Scored(tuple(requests), (), images, levels)
    rewards, aligned = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    metrics = summarise(rewards, {"alignment": aligned}, torch.ones(5), scored, requests, Workgroup())
    assert metrics["held_out_mean"] == 3.0
    assert metrics["held_out_ci"] == pytest.approx(1.96 * rewards.std().item() / 5**0.5)
    assert metrics["held_out_diversity"] == pytest.approx((0.1 + 0.3) / 2)
    assert metrics["watched"]["alignment"]["mean"] == pytest.approx(0.6)


def test_the_sheet_shows_one_image_of_each_prompt_and_large_ones_smaller():
    settings = {"name": "x", "reward": "brightness", "held_out_images": 40, "held_out_images_per_prompt": 2}
    requests = plan_held_out(TrainConfig.parse(settings), ["a", "b"])
    levels = torch.arange(40) / 40
    images = levels.view(40, 1, 1, 1).expand(40, 3, 64, 48)
    row = sheet_row(Scored(tuple(requests), (), images, levels))
    assert row.shape == (8, 3, 64, 48)
    assert row[:, 0, 0, 0].tolist() == [round(255 * place / 40) for place in range(0, 16, 2)]
    large = torch.rand(40, 3, 2, 2).repeat_interleave(256, 2).repeat_interleave(128, 3)
    row = sheet_row(Scored(tuple(requests), (), large, levels))
    assert row.shape == (8, 3, 256, 128)
    torch.testing.assert_close(row[:, :, 5, 5], (255 * large[0:16:2, :, 10, 10]).round().to(torch.uint8))


def test_a_prompts_images_stay_with_one_worker():
    config = TrainConfig.parse(
        {"name": "x", "reward": "brightness", "held_out_images": 10, "held_out_images_per_prompt": 4}
    )
    requests = plan_held_out(config, ["a", "b", "c"])
    workers = []
    for rank in range(2):
        workgroup = Workgroup()
        workgroup.rank, workgroup.size = rank, 2
        workers.append(owned_requests(requests, workgroup))
    assert [request.index for owned in workers for request in owned] == list(range(10))
    assert not {request.group for request in workers[0]} & {request.group for request in workers[1]}


def test_alpha_is_constant_without_a_target():
    control = KLControl(0.01, None)
    control.observe_held_out(1e6)
    assert [control.step(kl) for kl in (0.0, 5.0, 1e9)] == [0.01] * 3


def test_alpha_rises_above_the_target_and_falls_back_to_kl_weight():
    control = KLControl(0.01, 100.0)
    assert [control.step(50.0) for _ in range(3)] == [0.01] * 3
    steady = KLControl(0.01, 100.0)
    assert steady.step(110.0) == pytest.approx(0.01 * 1.1**GAIN)
    assert steady.step(110.0) == pytest.approx(0.01 * 1.1 ** (2 * GAIN))
    before = steady.weight
    assert steady.step(1e9) == pytest.approx(before * math.exp(GAIN * LARGEST))
    for _ in range(20):
        steady.step(20.0)
    assert steady.weight == 0.01


def test_alpha_looks_ahead():
    rising, level = KLControl(0.01, 100.0), KLControl(0.01, 100.0)
    for kl in (60.0, 70.0, 80.0):
        rising.step(kl)
        level.step(80.0)
    assert rising.weight > level.weight == 0.01


def test_rollouts_count_as_much_as_the_held_out_kl_of_the_same_policy():
    control = KLControl(0.01, 100.0)
    control.observe_held_out(120.0)
    assert control.step(40.0) == pytest.approx(0.01 * 1.2**GAIN)
    assert control.step(40.0) == pytest.approx(0.01 * 1.2 ** (2 * GAIN))
    restored = KLControl(0.01, 100.0)
    restored.load_state_dict(control.state_dict())
    assert restored.step(45.0) == control.step(45.0) > 0.012


def momentum_training(control: KLControl, rng: random.Random) -> list[float]:
    """Path KL of Adam on 40 parameters, ten of which a reward pulls at; all gradients are mostly noise."""
    parameters = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    pull = torch.tensor([0.3] * 10 + [0.0] * 30, dtype=torch.float64)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    seen = []
    for _ in range(60):
        kl = 30 * parameters.detach().square().sum().item()
        alpha = control.step(kl * math.exp(rng.gauss(0, 0.15)))
        noise = torch.randn(40, generator=generator, dtype=torch.float64)
        parameters.grad = noise - pull + alpha * 60 * parameters.detach()
        optimizer.step()
        seen.append(kl)
    return seen


def test_training_keeps_its_budget():
    free = momentum_training(KLControl(0.0005, None), random.Random(0))
    assert free[-1] > 180
    for seed in range(3):
        seen = momentum_training(KLControl(0.0005, 100.0), random.Random(seed))
        assert max(seen) < 175
        assert 50 < sum(seen[30:]) / 30 < 130
