"""The notebook face, and the lazy names of the package."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import blend
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


def test_what_cannot_be_asked_for_is_refused(pipeline):
    with pytest.raises(PreferenceError, match="'d'"):
        pipeline("a cat", {"d": 1.0}, **FAST)
    with pytest.raises(ValueError, match="both seed and generator"):
        pipeline("a cat", seed=1, generator=torch.Generator(), **FAST)
    with pytest.raises(ValueError, match="empty list"):
        pipeline([], **FAST)


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
