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
from blend.rewards.contrast import SATURATION as CONTRAST_SATURATION
from blend.rewards.contrast import contrast
from blend.rewards.sharpness import SATURATION as SHARPNESS_SATURATION
from blend.rewards.sharpness import sharpness
from blend.rewards.warmth import SATURATION as WARMTH_SATURATION
from blend.rewards.warmth import opponents, warmth
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


@pytest.mark.parametrize(
    ("measure", "saturation"),
    [
        (brightness, BRIGHTNESS_SATURATION),
        (contrast, CONTRAST_SATURATION),
        (sharpness, SHARPNESS_SATURATION),
        (warmth, WARMTH_SATURATION),
    ],
)
def test_the_others_saturate_near_the_95th_percentile_of_the_data(scenes, measure, saturation):
    scores = measure(scenes)
    assert np.percentile(scores, 95) == pytest.approx(saturation, abs=0.2 * float(scores.std()))
    assert float((load_reward(measure.__name__)(scenes, [""] * len(scenes)) == scores).float().mean()) > 0.9


def test_contrast_is_the_spread_of_the_luma():
    halves = torch.full((2, 3, 8, 8), 0.3)
    halves[0, :, :4] = 0.5
    halves[1, :, :4] = 1
    assert contrast(halves).tolist() == pytest.approx([0.1, 0.35], rel=1e-4)
    assert load_reward("contrast")(halves, [""] * 2).tolist() == pytest.approx([0.1, CONTRAST_SATURATION], rel=1e-4)


def test_sharpness_is_the_slope_of_the_luma_in_either_direction():
    ramp = torch.linspace(0, 1, 11).expand(1, 3, 11, 11)
    both = (ramp + ramp.transpose(2, 3)) / 2
    assert sharpness(torch.cat([ramp, ramp.transpose(2, 3), ramp.flip(3)])).tolist() == pytest.approx(
        [0.1] * 3, rel=1e-3
    )
    assert float(sharpness(both)) == pytest.approx(0.05 * 2**0.5, rel=1e-3)
    with pytest.raises(RewardError, match="2 x 8 pixels have no edges"):
        load_reward("sharpness")(torch.zeros(1, 3, 8, 2), [""])


def test_a_blurred_scene_is_less_sharp_and_less_contrasted(scenes):
    blurred = torch.nn.functional.avg_pool2d(scenes, 5, stride=1, padding=2, count_include_pad=False)
    assert (sharpness(blurred) < sharpness(scenes)).all()
    assert (contrast(blurred) < contrast(scenes)).all()


def test_warmth_of_known_colours():
    colours = torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0], [0, 0, 1], [1, 0.5, 0], [0, 0.625, 1]]).view(5, 3, 1, 1)
    a, b = (channel.flatten().tolist() for channel in opponents(colours))
    # CIELAB of grey, red and blue under D65
    assert a[:3] == pytest.approx([0, 80.1, 79.2], abs=0.2)
    assert b[:3] == pytest.approx([0, 67.2, -107.9], abs=0.2)
    grey, red, blue, orange, azure = warmth(colours).tolist()
    chroma, hue = np.hypot(a[1], b[1]), np.arctan2(b[1], a[1])
    assert red == pytest.approx(-0.5 + 0.02 * chroma**1.07 * np.cos(hue - np.radians(50)), rel=1e-4)
    assert grey == pytest.approx(-0.5, abs=1e-3)
    assert azure < blue < grey < orange < red


def test_the_range_of_warmth_holds_every_colour():
    steps = torch.linspace(0, 1, 18)
    colours = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).reshape(3, -1).T.reshape(-1, 3, 1, 1)
    scores = warmth(colours)
    low, high = load_reward("warmth").range
    assert low < float(scores.min()) < low + 0.1
    assert float(scores.max()) > high == WARMTH_SATURATION


def test_rewards_without_weights_are_six_and_no_two_of_them_alike(scenes):
    names = [name for name in REWARDS if name != "alignment"]
    table = np.corrcoef(np.stack([load_reward(name)(scenes, [""] * len(scenes)) for name in names]))
    assert len(names) == 6
    assert np.abs(table[np.triu_indices(6, 1)]).max() < 0.8
    # each pulls against another one
    assert (table.min(axis=0) < -0.05).all()


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
