"""DPM-Solver++ inside the engine: beside DDIM in one batch, with every method, and against a diffusers pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from blend.engine import BlendEngine, Sample, SampleError
from blend.lora_file import WEIGHT_NAME
from blend.preference import Preference


def prefer(kl_lambda: float = 1.0, method: str = "mpa", **weights: float) -> Preference:
    return Preference.parse(weights, kl_lambda, method, basis=("a", "b", "c"))


def sample_of(preference: Preference, **fields) -> Sample:
    return Sample(
        **{
            "prompt": "a cat",
            "preference": preference,
            "seed": 3,
            "num_inference_steps": 5,
            "solver": "dpmpp",
            **fields,
        }
    )


def latents_of(engine: BlendEngine, sample: Sample) -> torch.Tensor:
    output = engine.run([sample])[0]
    assert output.error is None
    assert output.latents is not None
    return output.latents


@pytest.fixture
def engine(tiny_model, tiny_bank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("steps", [4, 16])
def test_one_adapter_equals_a_diffusers_pipeline_with_that_scheduler(
    engine, tiny_sd_dir: Path, adapter_dirs, eta, algorithm, steps
):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type=algorithm, timestep_spacing="linspace"
    )
    pipeline.load_lora_weights(adapter_dirs["b"], weight_name=WEIGHT_NAME)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a cat",
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images[0]
    latents = latents_of(engine, sample_of(prefer(b=1.0), eta=eta, num_inference_steps=steps))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


MIXED = [
    sample_of(prefer(0.5, a=0.2, b=0.8), seed=1, num_inference_steps=7, eta=0.0),
    sample_of(prefer(1.5, a=0.5, c=0.5), seed=2, solver="ddim"),
    sample_of(prefer(b=1.0), seed=3, num_inference_steps=3, eta=0.5),
    sample_of(prefer(0.7, "ls", a=0.5, c=0.5), seed=4),
    sample_of(prefer(b=0.5, c=0.5), seed=5, solver="ddim", eta=0.0, num_inference_steps=2, record=True),
]


def test_solvers_share_a_batch_bit_by_bit(tiny_model, tiny_bank):
    engine = BlendEngine(tiny_model, tiny_bank, tile_rows=4, deterministic=True)
    for sample, output in zip(MIXED, engine.run(MIXED), strict=True):
        assert torch.equal(output.latents, latents_of(engine, sample))


def test_a_sample_that_joins_late_keeps_its_own_history(tiny_model, tiny_bank):
    engine = BlendEngine(tiny_model, tiny_bank, tile_rows=4, deterministic=True)
    outputs = {}
    tickets = {}
    for sample in MIXED:
        tickets[engine.submit(sample)] = sample
        outputs.update(engine.step())
    while not engine.idle:
        outputs.update(engine.step())
    for ticket, sample in tickets.items():
        assert torch.equal(outputs[ticket].latents, latents_of(engine, sample))


@pytest.mark.parametrize("method", ["ls", "soup"])
def test_with_one_hot_weights_every_method_is_that_adapter(engine, method):
    torch.testing.assert_close(
        latents_of(engine, sample_of(prefer(b=1.0, method=method))),
        latents_of(engine, sample_of(prefer(b=1.0))),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_solver_makes_a_difference(engine):
    for steps in (1, 3):
        fast = latents_of(engine, sample_of(prefer(a=1.0), num_inference_steps=steps))
        slow = latents_of(engine, sample_of(prefer(a=1.0), num_inference_steps=steps, solver="ddim"))
        assert (fast - slow).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"solver": "euler"}, "solver", "'euler': use one of ddim, dpmpp"),
        ({"solver": None}, "solver", "None: use one of"),
        ({"record": True}, "solver", "record and measure_kl.*use ddim"),
        ({"measure_kl": True}, "solver", "record and measure_kl.*use ddim"),
        ({"num_inference_steps": 1000}, "num_inference_steps", "use fewer"),
        ({"num_inference_steps": 0}, "num_inference_steps", "integer from 1"),
    ],
)
def test_what_the_solver_cannot_do_is_refused(engine, fields, param, match):
    with pytest.raises(SampleError, match=match) as caught:
        engine.submit(replace(sample_of(prefer(a=1.0)), **fields))
    assert caught.value.param == param
