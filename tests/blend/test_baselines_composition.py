"""LoRA Switch and LoRA Composite: their schedules, and what they equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blend.adapters import AdapterBank
from blend.baselines import composite, switch
from blend.baselines.walk import Walk
from blend.ddim import ddim_step
from blend.engine import BlendEngine, Sample, SampleError
from blend.model import DiffusionModel
from blend.plans import plan_rows
from blend.preference import Preference, PreferenceError

BASIS = ("a", "b", "c")


def sample(**fields) -> Sample:
    return Sample(
        **{"prompt": "A cup.", "preference": Preference.base(), "seed": 3, "num_inference_steps": 4, **fields}
    )


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    # random weights blow latents up to tens; rounding is judged against their size
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


@given(steps=st.integers(1, 40), every=st.integers(1, 7), order=st.permutations(BASIS))
def test_switch_is_exactly_round_robin(steps, every, order):
    switched = switch(sample(num_inference_steps=steps), order, every=every)
    plan = plan_rows(switched, BASIS, steps, measured=False)
    # the source's equation (2): i = floor(((t - 1) mod (K tau)) / tau) + 1 at step t = 1, 2, ..
    expected = [order[((t - 1) % (3 * every)) // every] for t in range(1, steps + 1)]
    for step, name in zip(plan.steps, expected, strict=True):
        assert step.mixes.tolist() == [[float(name == other) for other in BASIS]] * 2
    assert plan.rows_until(steps) == 2 * steps


def test_switch_depends_on_no_seed(engine):
    plans = [plan_rows(switch(sample(seed=seed), BASIS), BASIS, 4, measured=False) for seed in range(5)]
    assert all([s.mixes.tolist() for s in p.steps] == [s.mixes.tolist() for s in plans[0].steps] for p in plans)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_switch_and_composite_of_one_adapter_are_that_adapter(engine, eta):
    plain = sample(eta=eta)
    alone = replace(plain, preference=Preference.parse({"b": 1.0}, basis=BASIS))
    outputs = engine.run([alone, switch(plain, ["b"], every=3), composite(plain, ["b"])])
    for output in outputs[1:]:
        assert_close(output.latents, outputs[0].latents)
        assert output.rows == outputs[0].rows


@torch.no_grad()
def test_switch_takes_each_step_with_that_adapter_alone(engine, tiny_model):
    plain = sample(num_inference_steps=3, eta=0.0)
    latents = Walk(engine, [plain]).begin()
    timesteps, prev_timesteps = tiny_model.timesteps(3)
    for step, column in enumerate((2, 0, 2)):
        pred = guided(engine, latents, timesteps[step], column, plain)
        at, to = timesteps[step : step + 1], prev_timesteps[step : step + 1]
        latents = tiny_model.ddim_step(pred, latents, at, to, eta=0.0, noise=None).prev_sample
    assert_close(engine.run([switch(plain, ["c", "a"])])[0].latents, latents[0])


@torch.no_grad()
def test_composite_is_the_mean_of_the_separately_guided_predictions(engine, tiny_model):
    plain = sample(num_inference_steps=3, negative_prompt="blue")
    generator = torch.Generator().manual_seed(plain.seed)
    latents = torch.randn(1, *tiny_model.latents_shape(32, 32), generator=generator)
    timesteps, prev_timesteps = tiny_model.timesteps(3)
    for step in range(3):
        preds = torch.stack([guided(engine, latents, timesteps[step], column, plain) for column in (0, 1, 2)])
        latents = ddim_step(
            preds.mean(0),
            latents,
            timesteps[step : step + 1],
            prev_timesteps[step : step + 1],
            tiny_model.scheduler.alphas_cumprod,
            eta=1.0,
            noise=torch.randn(latents.shape[1:], generator=generator)[None],
            prediction_type="epsilon",
            final_alpha_cumprod=tiny_model.scheduler.final_alpha_cumprod,
        ).prev_sample
    output = engine.run([composite(plain, BASIS)])[0]
    assert_close(output.latents, latents[0])
    assert output.rows == 2 * 3 * 3


def guided(engine: BlendEngine, latents: torch.Tensor, timestep: torch.Tensor, column: int, of: Sample) -> torch.Tensor:
    """One adapter's guided prediction, from two forwards of its own."""
    text = engine.model.encode_prompts([of.negative_prompt or None, of.prompt]).embeds
    mix = torch.eye(3)[column : column + 1]
    uncond, cond = (engine.bank.forward(latents, timestep[None], row[None], mix) for row in text)
    return uncond + of.guidance_scale * (cond - uncond)


@pytest.mark.parametrize(
    ("names", "kl_lambda", "message"),
    [
        (("a",) * 3, 1.0, "use 4"),
        (("a", "b", "a", "z"), 1.0, "among a, b"),
        (("a", "b", "a", "c"), 1.0, "among a, b"),
        (("a", "b", "a", "b"), 0.5, "use kl_lambda 1"),
        (["a", "b", "a", "b"], 1.0, "tuple of adapter names"),
    ],
    ids=["short", "unknown", "of weight 0", "lambda", "list"],
)
def test_schedules_that_cannot_run_are_refused(engine, names, kl_lambda, message):
    preference = Preference.parse({"a": 0.9, "b": 0.1}, kl_lambda, "ls", basis=BASIS)
    with pytest.raises(SampleError, match=message) as refusal:
        engine.submit(sample(preference=preference, ls_schedule=names))
    assert refusal.value.param == "ls_schedule"


def test_no_adapters_and_no_period_are_refused():
    for rival in (composite, switch):
        with pytest.raises(PreferenceError):
            rival(sample(), [])
    with pytest.raises(ValueError, match="every is 0"):
        switch(sample(), BASIS, every=0)
