"""Adapters of different layers and ranks in one bank: each is what diffusers and PEFT make of it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.lora_file import WEIGHT_NAME
from blend.model import DiffusionModel, load_model
from blend.preference import Preference

CONFIGS = {
    "queries": LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"]),
    "text": LoraConfig(r=5, lora_alpha=5, target_modules=["attn2.to_k"]),
    "others": LoraConfig(r=2, lora_alpha=4, target_modules=["ff.net.2", "time_emb_proj", "linear_1"]),
    "down": LoraConfig(r=7, lora_alpha=3, target_modules=r"down_blocks.*(to_k|to_out\.0)"),
}


@pytest.fixture(scope="module")
def model(tiny_sd_dir: Path) -> DiffusionModel:
    return load_model(tiny_sd_dir)


@pytest.fixture(scope="module")
def unets(tiny_sd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[UNet2DConditionModel, Path]]:
    """Each adapter on a UNet of its own, as diffusers and PEFT run it, and its saved directory."""
    root, made = tmp_path_factory.mktemp("targets"), {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        unet = UNet2DConditionModel.from_pretrained(tiny_sd_dir, subfolder="unet").requires_grad_(False)
        unet.add_adapter(config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in unet.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        StableDiffusionPipeline.save_lora_weights(
            root / name,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
        made[name] = (unet, root / name / WEIGHT_NAME)
    return made


@pytest.fixture(scope="module")
def bank(model, unets) -> AdapterBank:
    bank = AdapterBank(model.unet)
    for name, (_, path) in unets.items():
        bank.load(name, path)
    return bank


@pytest.mark.parametrize("kept_text", [False, True])
def test_adapters_of_other_layers_and_ranks_share_a_bank_and_a_batch(bank, unets, model, kept_text):
    generator = torch.Generator().manual_seed(0)
    count = len(unets)
    sample, timesteps = torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([981, 600, 250, 1])
    embeds = model.encode_prompts(["a car", None, "a dog", "a cat"]).embeds
    with torch.inference_mode():
        text = (bank.encode_text(embeds), torch.arange(count)) if kept_text else ()
        for shift in range(count):
            names = [list(unets)[(row + shift) % count] for row in range(count)]
            mix = torch.eye(count).roll(shift, 1)
            mixed = bank.forward(sample, timesteps, embeds, mix, *text)
            for row, name in enumerate(names):
                expected = unets[name][0](sample, timesteps, encoder_hidden_states=embeds).sample[row]
                torch.testing.assert_close(mixed[row], expected, rtol=1e-5, atol=1e-5)


def test_a_blend_of_such_adapters_is_the_blend_of_each(bank, model):
    # one deterministic step is linear in the noise prediction
    def step(preference: Preference) -> torch.Tensor:
        sample = Sample("a car", preference, 3, num_inference_steps=1, eta=0.0)
        output = BlendEngine(model, bank).run([sample])[0]
        assert output.latents is not None
        return output.latents

    weights = dict(zip(CONFIGS, (0.4, 0.3, 0.2, 0.1), strict=True))
    each = {name: step(Preference.parse({name: 1.0}, basis=bank.names)) for name in weights}
    expected = sum(weight * each[name] for name, weight in weights.items())
    blend = step(Preference.parse(weights, basis=bank.names))
    torch.testing.assert_close(blend, expected, rtol=0, atol=1e-5 * float(blend.abs().max()))
