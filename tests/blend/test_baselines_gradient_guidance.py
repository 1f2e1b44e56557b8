"""RGG: its gradient, its strength, what it costs and what it cannot follow."""

from __future__ import annotations

import pytest
import torch
from work_counter import counted

from blend.adapters import AdapterBank
from blend.baselines import WeightedReward, reward_guided
from blend.baselines.gradient_guidance import reward_gradient, tempered
from blend.baselines.walk import Walk
from blend.engine import BlendEngine, Sample, SampleError
from blend.model import DiffusionModel, load_model
from blend.preference import Preference
from blend.rewards import RewardError, load_reward

PROMPT = "A red colored car."
SCALES = {"brightness": (0.5, 0.1), "colourfulness": (0.4, 0.2), "compressibility": (-2.0, 0.5)}


def base(seed: int = 3, **fields) -> Sample:
    return Sample(
        **{"prompt": PROMPT, "preference": Preference.base(), "seed": seed, "num_inference_steps": 3, **fields}
    )


def mixed(**weights: float) -> WeightedReward:
    return WeightedReward({name: load_reward(name) for name in SCALES}, weights, SCALES)


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    # random weights blow latents up to tens; rounding is judged against their size
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("normalise", [False, True])
def test_scale_0_is_the_base(engine, redness, normalise):
    samples = [base(3), base(4, prompt="A cup.")]
    expected = engine.run(samples)
    found = reward_guided(engine, samples, redness, scale=0.0, normalise=normalise)
    for one, output in zip(found, expected, strict=True):
        assert_close(one.latents, output.latents)


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("weights", [{"brightness": 1.0}, {"brightness": 0.5, "colourfulness": 0.5}], ids=str)
def test_the_gradient_is_that_of_the_reward_through_the_predicted_image(engine, tiny_model, step, weights):
    walk, reward = Walk(engine, [base()]), mixed(**weights)
    latents = walk.begin()
    noise_pred, gradient = reward_gradient(tiny_model, walk, latents, step, reward)
    torch.testing.assert_close(noise_pred, walk.predict(latents, step), rtol=1e-4, atol=1e-5)

    def value(x: torch.Tensor) -> float:
        images = engine.decode(list(walk.origin(walk.predict(x, step), x, step)))
        return float(reward(images, [PROMPT]))

    generator = torch.Generator().manual_seed(0)
    for direction in (gradient, gradient + gradient.norm() / 16 * torch.randn(latents.shape, generator=generator)):
        unit, h = direction / direction.norm(), 0.02
        slope = (value(latents + h * unit) - value(latents - h * unit)) / (2 * h)
        assert slope == pytest.approx(float((gradient * unit).sum()), rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_is_pushed_by_the_stated_equation(tiny_sd_dir, redness, kind):
    model = load_model(tiny_sd_dir)
    model.prediction_type = kind
    engine = BlendEngine(model, AdapterBank(model.unet))
    sample = base(num_inference_steps=1, eta=0.0)
    (found,) = reward_guided(engine, [sample], redness, scale=50.0, tempering=None)
    walk = Walk(engine, [sample])
    latents = walk.begin()
    pred, gradient = reward_gradient(model, walk, latents, 0, redness)
    timestep = model.timesteps(1)[0]
    alpha = float(model.scheduler.alphas_cumprod[timestep])
    origin = walk.origin(pred, latents, 0)
    eps = (latents - alpha**0.5 * origin) / (1 - alpha) ** 0.5
    eps = eps - 50.0 * (1 - alpha) ** 0.5 * gradient
    origin = (latents - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    final = float(model.scheduler.final_alpha_cumprod)
    assert_close(found.latents, (final**0.5 * origin + (1 - final) ** 0.5 * eps)[0])


@torch.no_grad()
def test_a_small_push_raises_the_predicted_and_the_final_reward(engine, redness):
    samples, walks = [base(seed) for seed in range(2)], []
    for push in (0.0, 1.0):
        walk = Walk(engine, samples)
        latents = walk.begin()
        noise_pred, gradient = reward_gradient(engine.model, walk, latents, 0, redness)
        latents = walk.advance(noise_pred - push * gradient, latents, 0)
        images = engine.decode(list(walk.origin(walk.predict(latents, 1), latents, 1)))
        walks.append(redness(images, [PROMPT] * 2))
    assert (walks[1] > walks[0]).all()
    ends = [reward_guided(engine, samples, redness, scale=scale, tempering=None) for scale in (0.0, 1.0, 5.0)]
    finals = [redness(engine.decode([one.latents for one in end]), [PROMPT] * 2).mean() for end in ends]
    assert finals[0] < finals[1] < finals[2]


def test_normalised_pushes_do_not_depend_on_the_reward_s_unit(engine, redness):
    class Loud(type(redness)):
        def __call__(self, images, prompts):
            return 1000 * super().__call__(images, prompts)

    quiet, loud = (reward_guided(engine, [base()], r, scale=0.05, normalise=True)[0] for r in (redness, Loud()))
    assert_close(quiet.latents, loud.latents)
    assert (quiet.latents - engine.run([base()])[0].latents).abs().max() > 1e-3


def test_a_saturated_reward_pushes_nowhere(engine, redness):
    class Saturated(type(redness)):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts).clamp(max=-1e3)

    (found,) = reward_guided(engine, [base()], Saturated(), scale=5.0, normalise=True)
    assert_close(found.latents, engine.run([base()])[0].latents)


def test_tempering_grows_to_1_over_the_same_share_of_any_number_of_steps():
    assert tempered(0, 50, 0.024) == pytest.approx(0.024)
    assert tempered(9, 50, 0.024) == pytest.approx(1.024**10 - 1)
    assert tempered(3, 20, 0.024) == pytest.approx(tempered(9, 50, 0.024))
    assert tempered(28, 50, 0.024) < 1 == tempered(29, 50, 0.024) == tempered(0, 50, None)


def test_a_sample_does_not_depend_on_its_neighbours(engine, redness):
    samples = [base(3), base(9, prompt="A green bird.", negative_prompt="blue"), base(4)]
    together = reward_guided(engine, samples, redness, scale=5.0, tile_rows=4)
    for sample, one in zip(samples, together, strict=True):
        (alone,) = reward_guided(engine, [sample], redness, scale=5.0)
        assert_close(one.latents, alone.latents)
        assert one.cost == alone.cost


def test_the_stated_cost_is_what_ran(engine, tiny_model, redness):
    with counted(tiny_model) as seen:
        found = reward_guided(engine, [base(3), base(4)], redness, scale=1.0)
    cost = found[0].cost
    assert {name: 2 * getattr(cost, name) for name in seen} == seen == {"rows": 12, "gradients": 12, "decodes": 6}


def test_what_has_no_gradient_is_refused_by_name(engine):
    with pytest.raises(RewardError, match=r"^compressibility has no gradient"):
        reward_guided(engine, [base()], load_reward("compressibility"), scale=1.0)
    with pytest.raises(RewardError, match=r"^compressibility has no gradient"):
        reward_guided(engine, [base()], mixed(brightness=0.5, compressibility=0.5), scale=1.0)


@pytest.mark.parametrize("wrong", [{"scale": -1.0}, {"scale": float("nan")}, {"scale": 1.0, "tempering": 0.0}], ids=str)
def test_strengths_that_mean_nothing_are_refused(engine, redness, wrong):
    with pytest.raises(ValueError, match="use a finite number"):
        reward_guided(engine, [base()], redness, **wrong)


def test_other_models_than_the_base_and_broken_samples_are_refused(engine, redness):
    with pytest.raises(SampleError, match="base model alone"):
        reward_guided(engine, [base(preference=Preference(weights={"a": 1.0}))], redness, scale=1.0)
    (found,) = reward_guided(engine, [base(guidance_scale=1e38)], redness, scale=1.0)
    assert found.latents is None
    assert "seed 3" in str(found.error)


def test_a_sample_that_diverges_leaves_its_neighbours_alone(engine, redness):
    class Rooted(type(redness)):
        """Itself up to a ceiling, and flat above it, where a root has a slope that is no number."""

        def __call__(self, images, prompts):
            score = super().__call__(images, prompts)
            seen.append(score.detach())
            return torch.where(score < ceiling, score + 0 * (ceiling - score).sqrt(), ceiling)

    samples, ceiling, seen = [base(seed) for seed in range(2)], 1e3, []
    free = reward_guided(engine, samples, Rooted(), scale=1.0)
    highest = torch.stack(seen).amax(0)
    ceiling, (lower, higher) = float(highest.mean()), highest.argsort().tolist()
    found = reward_guided(engine, samples, Rooted(), scale=1.0)
    assert found[higher].latents is None
    assert_close(found[lower].latents, free[lower].latents)
