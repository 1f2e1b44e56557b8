"""The laws of the blend, on a tiny model of the real classes; diffusers' own pipelines are the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from blend.adapters import AdapterBank
from blend.ddim import log_prob_of
from blend.engine import BlendEngine, Output, Sample
from blend.lora_file import WEIGHT_NAME, read_lora
from blend.model import DiffusionModel, load_model
from blend.preference import Preference

PROMPT = "A red colored car."


def prefer(kl_lambda: float = 1.0, method: str = "mpa", **weights: float) -> Preference:
    return Preference.parse(weights, kl_lambda, method, basis=("a", "b", "c"))


def sample_of(preference: Preference, **fields) -> Sample:
    return Sample(**{"prompt": PROMPT, "preference": preference, "seed": 3, "num_inference_steps": 4, **fields})


def latents_of(output: Output) -> torch.Tensor:
    assert output.error is None
    assert output.latents is not None
    return output.latents


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def assert_same_in_company(a: torch.Tensor, b: torch.Tensor) -> None:
    # random weights blow latents up to tens; rounding is judged against their size
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


class Reference:
    """K + 1 separate StableDiffusionPipelines, each with one LoRA loaded by diffusers, stepped side by side."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        self.pipelines = {name: self._load(base, path) for name, path in {"base": None, **adapters}.items()}

    @staticmethod
    def _load(base: Path, path: Path | None) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        assert isinstance(pipeline.scheduler, DDIMScheduler)
        if path is not None:
            pipeline.load_lora_weights(path, weight_name=WEIGHT_NAME)
        return pipeline

    @torch.no_grad()
    def denoise(self, sample: Sample, coefficients: dict[str, float]) -> torch.Tensor:
        pipeline = self.pipelines["base"]
        text, uncond = pipeline.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt=sample.negative_prompt)
        pipeline.scheduler.set_timesteps(sample.num_inference_steps)
        generator = torch.Generator().manual_seed(sample.seed)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        for timestep in pipeline.scheduler.timesteps:
            noise_pred = torch.zeros_like(latents)
            for name, coefficient in coefficients.items():
                unet, two = self.pipelines[name].unet, torch.cat([latents] * 2)
                eps = unet(two, timestep, encoder_hidden_states=torch.cat([uncond, text])).sample
                eps_uncond, eps_text = eps.chunk(2)
                noise_pred += coefficient * (eps_uncond + sample.guidance_scale * (eps_text - eps_uncond))
            step = pipeline.scheduler.step(noise_pred, timestep, latents, eta=sample.eta, generator=generator)
            latents = step.prev_sample
        return latents[0]


@pytest.fixture(scope="module")
def reference(tiny_sd_dir: Path, adapter_dirs: dict[str, Path]) -> Reference:
    return Reference(tiny_sd_dir, adapter_dirs)


@pytest.mark.parametrize(
    ("preference", "coefficients"),
    [
        (prefer(a=0.5, b=0.3, c=0.2), {"a": 0.5, "b": 0.3, "c": 0.2}),
        (prefer(0.4, a=0.5, b=0.5), {"base": 0.6, "a": 0.2, "b": 0.2}),
        (prefer(1.5, a=0.25, c=0.75), {"base": -0.5, "a": 0.375, "c": 1.125}),
        (prefer(b=1.0), {"b": 1.0}),
        (prefer(0.0, b=1.0), {"base": 1.0}),
    ],
    ids=["mpa", "kla-0.4", "kla-1.5", "one-hot", "base"],
)
@pytest.mark.parametrize("fields", [{}, {"eta": 0.0, "guidance_scale": 7.5, "negative_prompt": "blue"}, {"eta": 0.5}])
def test_the_blend_equals_separate_diffusers_pipelines(engine, reference, preference, coefficients, fields):
    sample = sample_of(preference, **fields)
    # at eta 0 and guidance 7.5 diffusers' own float32 is 2e-5 from float64: judged against the latents' size
    assert_same_in_company(latents_of(engine.run([sample])[0]), reference.denoise(sample, coefficients))


def test_one_adapter_equals_a_whole_diffusers_call_with_the_same_generator(engine, reference):
    sample = sample_of(prefer(c=1.0), guidance_scale=5.0, eta=1.0)
    pipeline = reference.pipelines["c"]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=5.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images[0]
    assert_same_in_company(latents_of(engine.run([sample])[0]), expected)


def test_the_base_needs_no_adapters_at_all(engine, tiny_model):
    bare = BlendEngine(tiny_model, AdapterBank(tiny_model.unet))
    outputs = engine.run([sample_of(prefer(0.0, a=1.0)), sample_of(Preference.base())])
    expected = latents_of(bare.run([sample_of(Preference.base())])[0])
    for output in outputs:
        assert_same(latents_of(output), expected)


def test_adapters_and_strengths_do_make_a_difference(engine):
    preferences = [
        prefer(0.0, a=1.0),
        prefer(a=1.0),
        prefer(b=1.0),
        prefer(a=0.5, b=0.5),
        prefer(1.5, a=1.0),
        prefer(a=0.5, b=0.5, method="soup"),
        prefer(a=0.5, b=0.5, method="ls"),
    ]
    outputs = [latents_of(output) for output in engine.run([sample_of(p) for p in preferences])]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(("kl_lambda", "weights"), [(1.0, {"a": 0.6, "b": 0.4}), (1.5, {"b": 0.3, "c": 0.7})])
def test_the_soup_equals_a_unet_with_merged_weights(engine, tiny_sd_dir, adapter_dirs, kl_lambda, weights):
    merged = load_model(tiny_sd_dir)
    for name, weight in weights.items():
        for layer, factors in read_lora(adapter_dirs[name]).layers.items():
            product = factors.scale * factors.up @ factors.down
            merged.unet.get_submodule(layer).weight.data += kl_lambda * weight * product
    expected = BlendEngine(merged, AdapterBank(merged.unet)).run([sample_of(Preference.base())])[0]
    output = engine.run([sample_of(prefer(kl_lambda, "soup", **weights))])[0]
    assert_same(latents_of(output), latents_of(expected))


@pytest.mark.parametrize("method", ["ls", "soup"])
def test_with_one_hot_weights_every_method_is_that_adapter(engine, method):
    mpa, other = engine.run([sample_of(prefer(b=1.0)), sample_of(prefer(b=1.0, method=method))])
    assert_same(latents_of(other), latents_of(mpa))


def test_adapter_sampling_runs_one_source_a_step(engine, reference):
    sample = sample_of(prefer(0.5, "ls", a=0.5, b=0.5), num_inference_steps=6, guidance_scale=1.0, record=True)
    output = engine.run([replace(sample, measure_kl=False)])[0]
    assert output.rows == 6
    assert output.trajectory is not None
    path, pipeline = output.trajectory, reference.pipelines["base"]
    text, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    acting = []
    for i in range(6):
        means = {}
        for name in ("base", "a", "b"):
            with torch.no_grad():
                eps = (
                    reference.pipelines[name]
                    .unet(path.latents[i : i + 1], path.timesteps[i], encoder_hidden_states=text)
                    .sample
                )
            step = engine.model.ddim_step(
                eps,
                path.latents[i : i + 1],
                path.timesteps[i : i + 1],
                path.prev_timesteps[i : i + 1],
                eta=1.0,
                noise=None,
            )
            means[name] = float(log_prob_of(path.latents[i + 1 : i + 2], step.mean, step.std))
        acting.append([name for name, value in means.items() if abs(value - float(path.log_probs[i])) < 1e-4])
    assert all(len(names) == 1 for names in acting)
    assert {names[0] for names in acting} == {"base", "a", "b"}


def test_a_seed_means_one_image_and_another_seed_another(engine):
    sample = sample_of(prefer(a=0.5, b=0.5))
    first, again, other = (latents_of(engine.run([s])[0]) for s in (sample, sample, replace(sample, seed=4)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


MIXED = [
    sample_of(prefer(a=1.0), seed=1),
    sample_of(prefer(0.5, a=0.2, b=0.8), seed=2, num_inference_steps=6, guidance_scale=1.0, prompt="a"),
    sample_of(prefer(1.5, c=1.0), seed=3, num_inference_steps=2, eta=0.0, negative_prompt="dull"),
    sample_of(prefer(0.7, "ls", a=0.5, c=0.5), seed=4, num_inference_steps=5, eta=0.5),
    sample_of(prefer(1.2, "soup", a=0.3, b=0.3, c=0.4), seed=5, guidance_scale=7.5),
    sample_of(Preference.base(), seed=6, record=True),
    sample_of(prefer(b=1.0), seed=7, height=48, width=24),
]


def test_a_mixed_batch_equals_each_sample_alone(engine):
    together = engine.run(MIXED)
    assert [output.sample for output in together] == MIXED
    for sample, output in zip(MIXED, together, strict=True):
        assert_same_in_company(latents_of(output), latents_of(engine.run([sample])[0]))


def test_with_a_pinned_tile_a_mixed_batch_is_bit_identical(tiny_model, tiny_bank):
    engine = BlendEngine(tiny_model, tiny_bank, tile_rows=4, deterministic=True)
    for sample, output in zip(MIXED, engine.run(MIXED), strict=True):
        assert torch.equal(latents_of(output), latents_of(engine.run([sample])[0]))


def test_the_latents_follow_the_size(engine):
    assert latents_of(engine.run([MIXED[-1]])[0]).shape == (4, 12, 6)


def test_a_recorded_trajectory_replays_with_ratio_one_under_autograd(tiny_model, adapter_dirs):
    bank = AdapterBank(tiny_model.unet)
    bank.load("a", adapter_dirs["a"])
    parameters = bank.add_trainable("new", rank=2)
    preference = Preference.parse({"new": 1.0}, basis=bank.names)
    output = BlendEngine(tiny_model, bank).run([sample_of(preference, guidance_scale=1.0, record=True)])[0]
    path = output.trajectory
    assert path is not None
    assert_same(path.latents[-1], latents_of(output))
    embeds = tiny_model.encode_prompts([PROMPT]).embeds.expand(4, -1, -1)
    noise_pred = bank.forward(path.latents[:-1], path.timesteps, embeds, torch.tensor([[0.0, 1.0]] * 4))
    step = tiny_model.ddim_step(noise_pred, path.latents[:-1], path.timesteps, path.prev_timesteps, eta=1.0, noise=None)
    ratio = (log_prob_of(path.latents[1:], step.mean, step.std) - path.log_probs).exp()
    torch.testing.assert_close(ratio, torch.ones(4), rtol=1e-4, atol=1e-4)
    ratio.sum().backward()
    assert any(factor.grad is not None and factor.grad.any() for factor in parameters)
    for name in bank.names:
        bank.remove(name)


def test_the_path_kl_is_zero_for_the_base_grows_with_lambda_and_costs_rows_only_when_asked(engine):
    def measure(kl_lambda: float, **fields) -> Output:
        return engine.run([sample_of(prefer(kl_lambda, a=1.0), measure_kl=True, **fields)])[0]

    assert measure(0.0).path_kl == 0.0
    values = [measure(kl_lambda).path_kl for kl_lambda in (0.2, 0.5, 1.0)]
    assert 0 < values[0] < values[1] < values[2]
    assert measure(1.0).rows == 16
    assert measure(1.0, eta=0.0).path_kl is None
    plain, recorded, only_recorded = engine.run(
        [
            sample_of(prefer(a=1.0)),
            sample_of(prefer(a=1.0), record=True),
            sample_of(prefer(a=1.0), record=True, measure_kl=False),
        ]
    )
    assert (plain.rows, plain.path_kl, plain.trajectory) == (8, None, None)
    # float32 sums in batches of other sizes: the fifth digit is the processor's
    assert (recorded.rows, recorded.path_kl) == (16, pytest.approx(values[2], rel=1e-5))
    assert (only_recorded.rows, only_recorded.path_kl) == (8, None)
    assert_same(latents_of(recorded), latents_of(plain))


def test_the_path_kl_is_that_of_the_steps_gaussians(engine, reference):
    output = engine.run([sample_of(prefer(a=1.0), record=True, guidance_scale=1.0)])[0]
    path, total = output.trajectory, 0.0
    text, _ = reference.pipelines["base"].encode_prompt(PROMPT, "cpu", 1, False)
    for i in range(4):
        steps = []
        for name in ("a", "base"):
            x, t, prev = (values[i : i + 1] for values in (path.latents, path.timesteps, path.prev_timesteps))
            with torch.no_grad():
                eps = reference.pipelines[name].unet(x, t, encoder_hidden_states=text).sample
            steps.append(engine.model.ddim_step(eps, x, t, prev, eta=1.0, noise=None))
        gaussians = [torch.distributions.Normal(step.mean, step.std.view(1, 1, 1, 1)) for step in steps]
        total += float(torch.distributions.kl_divergence(*gaussians).mean())
    assert output.path_kl == pytest.approx(total, rel=1e-3)
