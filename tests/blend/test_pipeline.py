"""The notebook face, and the lazy names of the package."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import blend
from blend.adapters import AdapterBank, AdapterError
from blend.engine import DenoisingError, Sample
from blend.pipeline import DiffusionBlendPipeline
from blend.preference import Preference, PreferenceError

FAST = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipeline(tiny_sd_dir, adapter_dirs) -> DiffusionBlendPipeline:
    return DiffusionBlendPipeline.from_pretrained(tiny_sd_dir, adapters=adapter_dirs)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_images_are_those_of_the_engine(pipeline):
    weights = {"a": 0.5, "b": 0.5}
    result = pipeline(["a cat", "a dog"], weights, 0.5, seed=4, **FAST)
    assert [image.size for image in result.images] == [(32, 32)] * 2
    assert result.seeds == [4, 5]
    preference = Preference.parse(weights, 0.5, basis=("a", "b", "c"))
    outputs = pipeline.engine.run([Sample("a cat", preference, 4, **FAST), Sample("a dog", preference, 5, **FAST)])
    expected = pipeline.engine.decode([output.latents for output in outputs])
    assert np.abs(pixels(result.images) / 255 - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6


def test_one_prompt_may_be_a_string_and_without_weights_it_is_the_base(pipeline):
    base = pipeline("a cat", seed=1, **FAST)
    assert len(base.images) == 1
    off = pipeline("a cat", {"a": 1.0}, 0.0, seed=1, **FAST)
    assert np.array_equal(pixels(base.images), pixels(off.images))


def test_a_generator_draws_the_seeds_and_the_seeds_reproduce_the_images(pipeline):
    drawn = pipeline(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **FAST)
    again = pipeline(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **FAST)
    assert drawn.seeds == again.seeds
    assert np.array_equal(pixels(drawn.images), pixels(again.images))
    single = pipeline("a cat", seed=drawn.seeds[0], **FAST)
    assert np.abs(pixels(single.images).astype(int) - pixels(drawn.images[:1])).max() <= 1
    assert pipeline("a cat", **FAST).seeds != pipeline("a cat", **FAST).seeds


def test_lists_of_dials_are_rows_of_a_grid_from_the_same_seeds(pipeline):
    halves = {"a": 0.5, "b": 0.5}
    prompts, dials = ["a cat", "a dog"], [(None, 1.0), ({"a": 1.0}, 1.0), (halves, 1.5), (halves, 1.0)]
    grid = pipeline(prompts, [w for w, _ in dials], [x for _, x in dials], seed=4, **FAST)
    assert grid.seeds == [4, 5]
    assert [len(row) for row in grid.images] == [2] * 4
    for row, (weights, kl_lambda) in zip(grid.images, dials, strict=True):
        alone = pipeline(prompts, weights, kl_lambda, seed=4, **FAST)
        assert np.abs(pixels(row).astype(int) - pixels(alone.images)).max() <= 1
    methods = pipeline("a cat", halves, method=("mpa", "soup"), seed=4, output_type="pt", **FAST).images
    assert methods.shape == (2, 1, 3, 32, 32)
    assert not torch.equal(methods[0], methods[1])
    dial = pipeline("a cat", halves, np.linspace(0, 1, 3), seed=4, output_type="np", **FAST).images
    assert dial.shape == (3, 1, 32, 32, 3)


def test_output_types_are_those_of_diffusers(pipeline):
    shown = {kind: pipeline("a cat", seed=4, output_type=kind, **FAST).images for kind in ("pil", "pt", "np", "latent")}
    assert (shown["pt"].shape, shown["pt"].dtype) == ((1, 3, 32, 32), torch.float32)
    assert (shown["np"].shape, shown["np"].dtype) == ((1, 32, 32, 3), np.float32)
    assert torch.equal(shown["pt"], pipeline.engine.model.decode(shown["latent"]))
    assert np.array_equal(shown["np"], shown["pt"].permute(0, 2, 3, 1).numpy())
    assert np.abs(pixels(shown["pil"]) / 255 - shown["np"]).max() <= 0.5 / 255 + 1e-6


def test_several_images_per_prompt_lie_prompt_by_prompt(pipeline):
    many = pipeline(["a cat", "a dog"], num_images_per_prompt=2, negative_prompt=["x", ""], seed=4, **FAST)
    assert many.seeds == [4, 5, 6, 7]
    for index, (prompt, negative) in enumerate([("a cat", "x")] * 2 + [("a dog", "")] * 2):
        alone = pipeline(prompt, negative_prompt=negative, seed=4 + index, **FAST)
        assert np.abs(pixels(alone.images).astype(int) - pixels(many.images[index : index + 1])).max() <= 1
    assert not np.array_equal(pixels(many.images[:1]), pixels(pipeline("a cat", seed=4, **FAST).images))


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("mpa", {"eta": 0.0}),
        ("mpa", {"solver": "dpmpp"}),
        ("mpa", {"guidance_interval": (0.0, 0.5)}),
        ("mpa", {"shared_unconditional": True}),
        ("mpa", {"height": 40}),
        ("ls", {"ls_schedule": "iid"}),
        ("cached", {"refresh_every": 1}),
        ("staged", {"row_budget": 2.0}),
    ],
)
def test_options_reach_the_sample(pipeline, method, option):
    dials = {**FAST, "num_inference_steps": 6}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    found = pipeline("a cat", weights, method=method, seed=4, output_type="latent", **dials, **option).images
    preference = Preference.parse(weights, 1.0, method, basis=pipeline.basis)
    [output] = pipeline.engine.run([Sample("a cat", preference, 4, **dials, **option)])
    assert torch.equal(found[0], output.latents)
    plain = pipeline("a cat", weights, method=method, seed=4, output_type="latent", **dials).images
    assert not torch.equal(found, plain)


def test_without_a_bundle_the_defaults_are_those_of_diffusers(pipeline, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline.engine, "run", lambda samples, on_step: asked.extend(samples) or [])
    monkeypatch.setattr(pipeline.engine, "decode", lambda latents: torch.zeros(0, 3, 32, 32))
    pipeline("a cat")
    assert asked == [Sample("a cat", Preference.base(), asked[0].seed, num_inference_steps=50, guidance_scale=7.5)]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"weights": {"d": 1.0}}, PreferenceError, "'d'"),
        ({"weights": {"a": 2.0, "b": 2.0}}, PreferenceError, "sum to 4"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "both seed and generator"),
        ({"prompt": []}, ValueError, "empty list"),
        ({"steps": 3}, TypeError, r"unknown option 'steps': besides .* use eta, solver, height"),
        ({"record": True}, TypeError, "unknown option 'record'"),
        ({"row_budget": 0.5}, ValueError, "row_budget is 0.5"),
        ({"output_type": "jpg"}, ValueError, "output_type is 'jpg': use one of pil, pt, np, latent"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt is 0"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "lists 2 texts for 1 prompts"),
        ({"kl_lambda": 0.5}, ValueError, "kl_lambda is 0.5 .* no weights: give weights over a, b, c"),
        ({"method": "ls"}, ValueError, "method 'ls', but there are no weights"),
        ({"weights": []}, ValueError, "weights has 0"),
        ({"weights": [None, None], "kl_lambda": [1.0]}, ValueError, "weights has 2, kl_lambda has 1"),
        ({"weights": [None, {"a": 1.0}], "method": "sum"}, PreferenceError, "unknown method 'sum'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(pipeline, asked, error, message):
    with pytest.raises(error, match=message):
        pipeline(**{"prompt": "a cat", **FAST, **asked})


def test_an_adapter_of_another_base_is_refused(pipeline, tiny_sd_dir, tmp_path):
    foreign = AdapterBank(pipeline.engine.model.unet, base_hash="1" * 64)
    foreign.add_trainable("x", rank=1)
    foreign.save("x", tmp_path)
    with pytest.raises(AdapterError, match="tuned from the base 111111111111"):
        DiffusionBlendPipeline.from_pretrained(tiny_sd_dir, adapters={"x": tmp_path})


def test_a_failed_sample_is_an_error(pipeline):
    with pytest.raises(DenoisingError, match="not finite"):
        pipeline("a cat", {"a": 1.0}, seed=1, num_inference_steps=3, guidance_scale=1e38)


def test_the_bar_shows_when_asked(pipeline, capsys):
    pipeline("a cat", seed=1, progress=True, **FAST)
    assert "1/1" in capsys.readouterr().err


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, blend; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


def test_every_public_name_is_there():
    for name in blend.__all__:
        assert getattr(blend, name).__name__ == name
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = blend.nothing
