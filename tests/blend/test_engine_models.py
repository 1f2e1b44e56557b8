"""The engine on other kinds of models: other noise schedules and predictions, half precision, adapted layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

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


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_in_bfloat16_the_blend_stays_near_and_latents_stay_float32(request, kind):
    directory, adapters, model, exact_bank = (
        request.getfixturevalue(name)
        for name in {
            "sd": ("tiny_sd_dir", "adapter_dirs", "tiny_model", "tiny_bank"),
            "sdxl": ("tiny_sdxl_dir", "sdxl_adapter_dirs", "tiny_sdxl_model", "tiny_sdxl_bank"),
        }[kind]
    )
    half = load_model(directory, dtype=torch.bfloat16)
    bank = AdapterBank(half.unet)
    for name, path in adapters.items():
        bank.load(name, path)
    preference = Preference.parse({"a": 0.5, "b": 0.5}, 0.5, basis=bank.names)
    sample = Sample("a cat", preference, 5, num_inference_steps=4)
    rough = BlendEngine(half, bank).run([sample])[0].latents
    exact = BlendEngine(model, exact_bank).run([sample])[0].latents
    assert rough is not None
    assert exact is not None
    assert rough.dtype == torch.float32
    assert (rough - exact).std() < 0.05 * exact.std()
    assert half.decode(rough[None]).dtype == torch.float32


@pytest.fixture(scope="module")
def tiny_sd2_dir(tiny_sd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Stable Diffusion 2: v prediction, heads by block, linear projections, another encoder, 10 x 10 latents."""
    directory = Path(shutil.copytree(tiny_sd_dir, tmp_path_factory.mktemp("sd2") / "model"))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        UNet2DConditionModel(
            sample_size=10,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=(2, 4),
            cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=True,
            upcast_attention=True,
        ).save_pretrained(directory / "unet")
        known = json.loads((directory / "text_encoder" / "config.json").read_text())
        wanted = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu"}
        CLIPTextModel(CLIPTextConfig(**{**known, **wanted})).save_pretrained(directory / "text_encoder")
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    return directory


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_stable_diffusion_2_gives_what_diffusers_gives(tiny_sd2_dir, tmp_path, eta):
    model = load_model(tiny_sd2_dir)
    assert (model.prediction_type, model.default_height, model.default_width) == ("v_prediction", 40, 40)
    bank = AdapterBank(model.unet)
    factors = bank.add_trainable("a", rank=3, target_modules=("to_q", "to_k", "to_v", "to_out.0", "proj_in"))
    generator = torch.Generator().manual_seed(1)
    for factor in factors:
        factor.data = 0.3 * torch.randn(factor.shape, generator=generator)
    bank.save("a", tmp_path)
    bank.load("saved", tmp_path)
    preference = Preference.parse({"saved": 1.0}, basis=bank.names)
    sample = Sample("a cat", preference, 5, num_inference_steps=5, negative_prompt="blurry", eta=eta)
    output = BlendEngine(model, bank).run([sample])[0]

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd2_dir, scheduler=model.scheduler, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a cat",
        negative_prompt="blurry",
        num_inference_steps=5,
        guidance_scale=3.0,
        eta=eta,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images[0]
    assert output.latents is not None
    torch.testing.assert_close(output.latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
