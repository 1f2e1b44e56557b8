"""The engine on the SDXL architecture: against diffusers' own pipeline, and its own laws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from blend.adapters import AdapterBank, AdapterError
from blend.engine import BlendEngine, Output, Sample
from blend.lora_file import WEIGHT_NAME
from blend.model import DiffusionModel, load_model
from blend.pipeline import DiffusionBlendPipeline
from blend.preference import Preference
from blend.tiles import TileOptions

STEPS = 4


def latents_of(output: Output) -> Tensor:
    assert output.error is None
    assert output.latents is not None
    return output.latents


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def one_hot(name: str | None) -> Preference:
    return Preference.base() if name is None else Preference.parse({name: 1.0}, basis=("a", "b"))


def pipeline_of(directory: Path, adapter: Path | None) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(directory, scheduler=load_model(directory).scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter, weight_name=WEIGHT_NAME)
    return pipeline


def diffusers_latents(pipeline: StableDiffusionXLPipeline, sample: Sample, output_type: str = "latent") -> Tensor:
    return pipeline(
        sample.prompt,
        negative_prompt=sample.negative_prompt or None,
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        eta=sample.eta,
        height=sample.height,
        width=sample.width,
        generator=torch.Generator().manual_seed(sample.seed),
        output_type=output_type,
    ).images[0]


@pytest.fixture(scope="module")
def engine(tiny_sdxl_model: DiffusionModel, tiny_sdxl_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_sdxl_model, tiny_sdxl_bank)


@pytest.mark.parametrize("adapter", [None, "a", "b"])
def test_the_base_and_each_adapter_alone_give_what_diffusers_gives(engine, tiny_sdxl_dir, sdxl_adapter_dirs, adapter):
    pipeline = pipeline_of(tiny_sdxl_dir, sdxl_adapter_dirs.get(adapter))
    settings = [
        {"eta": 0.0},
        {"eta": 1.0, "guidance_scale": 7.5},
        {"eta": 0.5, "guidance_scale": 1.0},
        {"negative_prompt": "blurry", "height": 40, "width": 24},
    ]
    samples = [
        Sample("a cat", one_hot(adapter), seed, num_inference_steps=STEPS, **dials)
        for seed, dials in enumerate(settings)
    ]
    for sample, output in zip(samples, engine.run(samples), strict=True):
        assert_near(latents_of(output), diffusers_latents(pipeline, sample))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("changes", [{"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}])
def test_other_schedules_and_predictions_give_what_diffusers_gives(
    tiny_sdxl_dir, sdxl_adapter_dirs, tmp_path, changes, eta
):
    directory = Path(shutil.copytree(tiny_sdxl_dir, tmp_path / "model"))
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    model = load_model(directory)
    bank = AdapterBank(model.unet)
    bank.load("a", sdxl_adapter_dirs["a"])
    preference = Preference.parse({"a": 1.0}, basis=("a",))
    sample = Sample("a cat", preference, 5, num_inference_steps=STEPS, eta=eta)
    expected = diffusers_latents(pipeline_of(directory, sdxl_adapter_dirs["a"]), sample)
    assert_near(latents_of(BlendEngine(model, bank).run([sample])[0]), expected)


def test_images_equal_diffusers(engine, tiny_sdxl_dir):
    sample = Sample("a cat", one_hot(None), 3, num_inference_steps=STEPS)
    image = engine.decode([latents_of(engine.run([sample])[0])])[0]
    expected = diffusers_latents(pipeline_of(tiny_sdxl_dir, None), sample, "pt")
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


def test_one_step_of_a_blend_is_the_blend_of_one_step_of_each(engine):
    # one deterministic step is linear in the noise prediction
    def step(preference: Preference) -> Tensor:
        return latents_of(engine.run([Sample("a cat", preference, 7, num_inference_steps=1, eta=0.0)])[0])

    base, a, b = (step(one_hot(name)) for name in (None, "a", "b"))
    blend = step(Preference.parse({"a": 0.3, "b": 0.7}, 1.5, basis=("a", "b")))
    assert_near(blend, base + 1.5 * (0.3 * a + 0.7 * b - base))


def mixed_samples() -> list[Sample]:
    blend = Preference.parse({"a": 0.3, "b": 0.7}, 0.8, basis=("a", "b"))
    scheduled = Preference.parse({"a": 0.5, "b": 0.5}, 1.0, "ls", basis=("a", "b"))
    return [
        Sample("a cat", blend, 0, num_inference_steps=3),
        Sample("a dog", scheduled, 1, negative_prompt="blurry", num_inference_steps=5, guidance_scale=5.0),
        Sample("", blend, 2, num_inference_steps=4, height=40, width=24),
        Sample("a cat", one_hot("b"), 3, num_inference_steps=2, guidance_scale=1.0, height=40, width=24, eta=0.0),
        Sample("a cat", blend, 0, num_inference_steps=3, height=24, width=40),
    ]


def test_a_mixed_batch_of_mixed_sizes_equals_each_sample_alone(engine):
    samples = mixed_samples()
    for sample, output in zip(samples, engine.run(samples), strict=True):
        assert_near(latents_of(output), latents_of(engine.run([sample])[0]))


def test_deterministic_tiles_give_the_same_bits_in_any_company(tiny_sdxl_model, tiny_sdxl_bank):
    engine = BlendEngine(tiny_sdxl_model, tiny_sdxl_bank, tile_rows=4, deterministic=True)
    samples = mixed_samples()
    for sample, output in zip(samples, engine.run(samples), strict=True):
        assert torch.equal(latents_of(output), latents_of(engine.run([sample])[0]))


def test_tiles_of_a_fixed_size_give_what_eager_ones_give(tiny_sdxl_dir, sdxl_adapter_dirs, engine):
    model = load_model(tiny_sdxl_dir)
    bank = AdapterBank(model.unet)
    for name, path in sdxl_adapter_dirs.items():
        bank.load(name, path)
    samples = mixed_samples()[:2]
    fixed = BlendEngine(model, bank, tiles=TileOptions(compile=True, backend="eager", sizes=(16,)))
    for output, expected in zip(fixed.run(samples), engine.run(samples), strict=True):
        assert_near(latents_of(output), latents_of(expected))


def test_the_notebook_face_takes_sdxl(tiny_sdxl_dir, sdxl_adapter_dirs, engine):
    pipeline = DiffusionBlendPipeline.from_pretrained(tiny_sdxl_dir, adapters=sdxl_adapter_dirs)
    image = pipeline("a cat", {"a": 1.0}, seed=3, num_inference_steps=STEPS, guidance_scale=3.0).images[0]
    expected = engine.decode([latents_of(engine.run([Sample("a cat", one_hot("a"), 3, num_inference_steps=STEPS)])[0])])
    assert image.size == (32, 32)
    assert np.abs(np.asarray(image) / 255 - expected[0].permute(1, 2, 0).numpy()).max() < 1 / 255


def test_the_size_asked_for_reaches_the_unet(engine):
    # the same latents under other time_ids
    model = engine.model
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    preds = []
    for size in (32, 64):
        rows = model.encode_prompts(["a cat"], size, size)
        with torch.no_grad():
            preds.append(
                engine.bank.forward(
                    latents, torch.tensor([500]), rows.embeds, torch.zeros(1, 2), added_cond_kwargs=rows.added
                )
            )
    assert (preds[0] - preds[1]).abs().max() > 1e-4


@pytest.mark.parametrize("adapter", ["a", "b"])
def test_an_adapter_equals_diffusers_own(tiny_sdxl_model, tiny_sdxl_bank, tiny_sdxl_dir, sdxl_adapter_dirs, adapter):
    unet = pipeline_of(tiny_sdxl_dir, sdxl_adapter_dirs[adapter]).unet
    rows = tiny_sdxl_model.encode_prompts(["a cat", None, "a dog"], 32, 40)
    latents = torch.randn(3, 4, 8, 10, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([981, 500, 1])
    mix = torch.tensor([[float(adapter == "a"), float(adapter == "b")]] * 3)
    with torch.no_grad():
        expected = unet(latents, timesteps, rows.embeds, added_cond_kwargs=dict(rows.added)).sample
        text = tiny_sdxl_bank.encode_text(rows.embeds)
        for kept in ((), (text, torch.arange(3))):
            got = tiny_sdxl_bank.forward(latents, timesteps, rows.embeds, mix, *kept, added_cond_kwargs=rows.added)
            assert_near(got, expected)


# kohya keeps the layer names of the original SDXL code, whose blocks count through (the tiny UNet has one layer each)
_ORIGINAL = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}


def to_kohya(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for key, tensor in load_file(path / WEIGHT_NAME).items():
        layer, factor = key.removeprefix("unet.").split(".lora_")
        flat = layer.replace(".", "_")
        for ours, original in _ORIGINAL.items():
            flat = flat.replace(ours, original)
        tensors[f"lora_unet_{flat}.lora_{'down' if factor == 'A.weight' else 'up'}.weight"] = tensor
        tensors[f"lora_unet_{flat}.alpha"] = torch.tensor(2.0)
    return tensors


def test_a_kohya_file_of_sdxl_is_read_as_diffusers_reads_it(
    tiny_sdxl_dir, tiny_sdxl_model, sdxl_adapter_dirs, tmp_path
):
    save_file(to_kohya(sdxl_adapter_dirs["a"]), tmp_path / WEIGHT_NAME)
    bank = AdapterBank(load_model(tiny_sdxl_dir).unet)
    bank.load("a", tmp_path)
    rows = tiny_sdxl_model.encode_prompts(["a cat"])
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500]), rows.embeds
    with torch.no_grad():
        got = bank.forward(*inputs, torch.ones(1, 1), added_cond_kwargs=rows.added)
        pipeline = pipeline_of(tiny_sdxl_dir, tmp_path)
        assert_near(got, pipeline.unet(*inputs, added_cond_kwargs=dict(rows.added)).sample)


@pytest.mark.parametrize("prefix", ["lora_te1_", "lora_te2_"])
def test_a_kohya_file_that_adapts_text_encoders_is_refused_by_its_own_key(
    tiny_sdxl_bank, sdxl_adapter_dirs, tmp_path, prefix
):
    layer = f"{prefix}text_model_encoder_layers_0_self_attn_q_proj"
    text = {f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(32, 2)}
    save_file(to_kohya(sdxl_adapter_dirs["a"]) | text, tmp_path / WEIGHT_NAME)
    with pytest.raises(AdapterError, match=f"{layer}.* adapts a text encoder.*UNet alone"):
        tiny_sdxl_bank.load("text", tmp_path)


def test_a_diffusers_file_that_adapts_text_encoders_is_refused(tiny_sdxl_bank, sdxl_adapter_dirs, tmp_path):
    key = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(load_file(sdxl_adapter_dirs["a"] / WEIGHT_NAME) | {key: torch.ones(2, 24)}, tmp_path / WEIGHT_NAME)
    with pytest.raises(AdapterError, match=r"text_encoder_2.* adapts a text encoder.*UNet alone"):
        tiny_sdxl_bank.load("text", tmp_path)


def test_an_adapter_of_another_architecture_is_refused(tiny_sdxl_bank, adapter_dirs):
    with pytest.raises(AdapterError, match="tuned from another base model"):
        tiny_sdxl_bank.load("sd", adapter_dirs["a"])
