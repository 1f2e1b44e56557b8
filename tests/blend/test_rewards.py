"""The embedded rewards: golden scores, batch invariance, ranges, conflict."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from blend.rewards import REWARDS, Reward, RewardError, load_reward
from blend.rewards.brightness import SATURATION as BRIGHTNESS_SATURATION
from blend.rewards.brightness import brightness
from blend.rewards.colourfulness import SATURATION, colourfulness
from blend.sprites import captions
from blend.sprites.codec import render_batch
from blend.sprites.scene import render


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    return (render_batch(400, random.Random(5)) + 1) / 2


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, list[str]]:
    prompts = captions.train_prompts(12)
    stack = np.stack([render(prompt, seed) for seed, prompt in enumerate(prompts)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255, prompts


@pytest.mark.parametrize("name", REWARDS)
def test_a_score_does_not_depend_on_the_batch(name, pictures):
    images, prompts = pictures
    reward = load_reward(name)
    assert isinstance(reward, Reward)
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))])
    assert together.shape == (12,)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    low, high = reward.range
    assert ((together >= low) & (together <= high)).all()


def test_colourfulness_of_known_pictures():
    grey = torch.full((1, 3, 8, 8), 0.4)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    halves = torch.zeros(1, 3, 8, 8)
    halves[:, 0, :4] = 1
    halves[:, 1, 4:] = 1
    scores = [float(colourfulness(image)) for image in (grey, red, halves)]
    # rg = 255, yb = 127.5, no spread: 0.3 * sqrt(255^2 + 127.5^2) / 100; halves: rg = +-255, yb = 127.5
    assert scores[0] == pytest.approx(0, abs=1e-5)
    assert scores[1] == pytest.approx(0.003 * np.hypot(255, 127.5), rel=1e-4)
    assert scores[2] == pytest.approx(2.55 + 0.3 * 1.275, rel=1e-4)
    assert float(load_reward("colourfulness")(halves, [""])) == pytest.approx(SATURATION)


def test_colourfulness_saturates_near_the_upper_end_of_the_data(scenes):
    assert np.percentile(colourfulness(scenes), 98) == pytest.approx(SATURATION, rel=0.08)


def test_colourfulness_is_differentiable():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    image.requires_grad_(True)
    load_reward("colourfulness")(image, [""]).sum().backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
    assert image.grad.abs().sum() > 0


def test_brightness_is_the_mean_luma():
    red, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    red[:, 0] = 1
    scores = load_reward("brightness")(torch.cat([red, white, 0.5 * white]), [""] * 3)
    assert scores.tolist() == pytest.approx([0.299, BRIGHTNESS_SATURATION, 0.5], rel=1e-5)


def test_brightness_saturates_near_the_95th_percentile_of_the_data(scenes):
    assert np.percentile(brightness(scenes), 95) == pytest.approx(BRIGHTNESS_SATURATION, rel=0.03)


def test_compressibility_is_minus_the_jpeg_size_in_kilobytes():
    flat = torch.full((1, 3, 64, 64), 0.5)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, busy = load_reward("compressibility")(torch.cat([flat, noise]), ["", ""]).tolist()
    assert -1.0 < plain < 0
    assert busy < 4 * plain


@pytest.mark.parametrize("other", ["compressibility", "brightness"])
def test_colourfulness_conflicts_with_the_other_basis_rewards(scenes, other):
    prompts = [""] * len(scenes)
    table = np.stack([load_reward(name)(scenes, prompts) for name in ("colourfulness", other)])
    assert np.corrcoef(table)[0, 1] < -0.1


def test_alignment_prefers_the_own_caption_to_a_stranger_and_to_near_misses(pictures):
    images, prompts = pictures
    reward = load_reward("alignment")
    own = reward(images, prompts)
    stranger = reward(images, prompts[1:] + prompts[:1])
    assert (own > stranger).all()
    assert (own - stranger).mean() > 0.5


def test_alignment_tells_which_colour_belongs_to_which_object():
    prompt, swapped = "A red car and a blue tree.", "A blue car and a red tree."
    stack = np.stack([render(prompt, seed) for seed in range(16)])
    images = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255
    reward = load_reward("alignment")
    assert (reward(images, [prompt] * 16) > reward(images, [swapped] * 16)).float().mean() >= 0.9


def test_unknown_reward_names_the_known_ones():
    with pytest.raises(RewardError, match="unknown reward 'beauty'; choose one of colourfulness"):
        load_reward("beauty")


@pytest.mark.parametrize("name", REWARDS)
def test_wrong_shapes_are_refused(name):
    with pytest.raises(RewardError, match="shape"):
        load_reward(name)(torch.zeros(3, 64, 64), ["a"])
    with pytest.raises(RewardError, match="2 images came with 1 prompts"):
        load_reward(name)(torch.zeros(2, 3, 64, 64), ["a"])


def test_alignment_refuses_pictures_of_another_world():
    with pytest.raises(RewardError, match="64 x 64"):
        load_reward("alignment")(torch.zeros(1, 3, 512, 512), ["a cat"])
