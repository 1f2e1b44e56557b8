"""The engine on other kinds of models: other noise schedules and predictions, half precision, adapted layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.lora_file import WEIGHT_NAME
from blend.model import load_model
from blend.preference import Preference


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"prediction_type": "v_prediction", "set_alpha_to_one": True},
        {"timestep_spacing": "linspace", "beta_schedule": "linear"},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    ],
    ids=["v-zero-snr", "v", "linspace", "made-from-pndm"],
)
def test_any_schedule_gives_what_diffusers_gives_with_ddim(tiny_sd_dir, adapter_dirs, tmp_path, changes, eta):
    directory = Path(shutil.copytree(tiny_sd_dir, tmp_path / "model"))
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    model = load_model(directory)
    bank = AdapterBank(model.unet)
    bank.load("a", adapter_dirs["a"])
    sample = Sample("a cat", Preference.parse({"a": 1.0}, basis=("a",)), 5, num_inference_steps=5, eta=eta)
    output = BlendEngine(model, bank).run([sample])[0]

    pipeline = StableDiffusionPipeline.from_pretrained(directory, scheduler=model.scheduler, safety_checker=None)
    pipeline.load_lora_weights(adapter_dirs["a"], weight_name=WEIGHT_NAME)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a cat",
        num_inference_steps=5,
        guidance_scale=3.0,
        eta=eta,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images[0]
    assert output.latents is not None
    torch.testing.assert_close(output.latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_in_bfloat16_the_blend_stays_near_and_latents_stay_float32(tiny_sd_dir, tiny_model, tiny_bank, adapter_dirs):
    half = load_model(tiny_sd_dir, dtype=torch.bfloat16)
    bank = AdapterBank(half.unet)
    for name, path in adapter_dirs.items():
        bank.load(name, path)
    preference = Preference.parse({"a": 0.5, "b": 0.5}, 0.5, basis=bank.names)
    sample = Sample("a cat", preference, 5, num_inference_steps=4)
    rough = BlendEngine(half, bank).run([sample])[0].latents
    exact = BlendEngine(tiny_model, tiny_bank).run([sample])[0].latents
    assert rough is not None
    assert exact is not None
    assert rough.dtype == torch.float32
    assert (rough - exact).std() < 0.05 * exact.std()
    assert half.decode(rough[None]).dtype == torch.float32
