"""Loading any Stable-Diffusion-class directory, and what it does besides denoising."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from blend.model import DiffusionModel, ModelError, load_model, model_hash


@pytest.fixture(scope="module")
def pipeline(tiny_sd_dir: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copied(tiny_sd_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd_dir, tmp_path / "copied"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_facts_of_the_model(tiny_model: DiffusionModel):
    assert (tiny_model.default_height, tiny_model.default_width) == (32, 32)
    assert tiny_model.vae_scale_factor == 4
    assert tiny_model.latents_shape(32, 40) == (4, 8, 10)
    assert tiny_model.prediction_type == "epsilon"
    assert not any(parameter.requires_grad for parameter in tiny_model.unet.parameters())


@pytest.mark.parametrize("prompt", ["A red colored car.", "", "far too long " * 40])
def test_embeddings_equal_diffusers_cut_off_included(tiny_model, pipeline, prompt):
    expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(tiny_model.encode_prompts([prompt]).embeds, expected)


def test_a_prompt_is_encoded_once_and_alike_in_any_company(tiny_sd_dir, monkeypatch):
    model = load_model(tiny_sd_dir)
    (text_encoder,) = model.text.text_encoders
    forward, calls = text_encoder.forward, []
    monkeypatch.setattr(text_encoder, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    alone = model.encode_prompts(["a cat"]).embeds
    together = model.encode_prompts(["a dog", "a cat", "a cat"]).embeds
    assert len(calls) == 2
    assert torch.equal(alone[0], together[1])
    assert torch.equal(together[1], together[2])


def test_embeddings_made_in_inference_mode_serve_a_backward_pass(tiny_sd_dir):
    model = load_model(tiny_sd_dir)
    with torch.inference_mode():
        model.encode_prompts(["a cat"])
    weight = torch.ones(1, requires_grad=True)
    (model.encode_prompts(["a cat"]).embeds * weight).sum().backward()
    assert weight.grad is not None


def test_images_equal_diffusers_and_do_not_depend_on_company(tiny_model, pipeline):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0].detach()
    images = tiny_model.decode(latents)
    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(images, pipeline.image_processor.postprocess(raw, output_type="pt"))
    assert torch.equal(images[1:2], tiny_model.decode(latents[1:2]))


@pytest.mark.parametrize("upcast", [True, False])
def test_in_float16_an_sdxl_decoder_that_overflows_runs_in_float32(tiny_sdxl_dir: Path, tmp_path: Path, upcast):
    directory = Path(shutil.copytree(tiny_sdxl_dir, tmp_path / "sdxl"))
    edit(directory / "vae" / "config.json", force_upcast=upcast)
    half, exact = load_model(directory, dtype=torch.float16), load_model(directory)
    assert half.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert half.unet.dtype == half.text.text_encoders[1].dtype == torch.float16
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = half.decode(latents)
    assert images.dtype == torch.float32
    assert (images - exact.decode(latents)).abs().max() < 0.01


def test_in_float16_other_decoders_stay_as_diffusers_leaves_them(tiny_sd_dir: Path):
    assert load_model(tiny_sd_dir, dtype=torch.float16).vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, lambda z: z / 0.5 + 0.25),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 1.0, 1.0, 0.5]},
            lambda z: z * torch.tensor([2.0, 1, 1, 0.5]).view(4, 1, 1) / 0.5 + torch.arange(1.0, 5).view(4, 1, 1),
        ),
    ],
)
def test_latents_are_scaled_back_as_the_autoencoder_says(copied: Path, changes, expected):
    edit(copied / "vae" / "config.json", **changes)
    model = load_model(copied)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model.vae.decode(expected(latents)).sample
    torch.testing.assert_close(model.decode(latents), raw.div(2).add(0.5).clamp(0, 1))


def test_a_tiny_autoencoder_will_do(copied: Path):
    shutil.rmtree(copied / "vae")
    channels = (8, 8, 8)
    AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(copied / "vae")
    edit(copied / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    model = load_model(copied)
    assert model.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("steps", [1, 3, 20, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(copied: Path, steps, spacing):
    edit(copied / "scheduler" / "scheduler_config.json", timestep_spacing=spacing)
    timesteps, prev_timesteps = load_model(copied).timesteps(steps)
    scheduler = load_model(copied).scheduler
    scheduler.set_timesteps(steps)
    assert torch.equal(timesteps, scheduler.timesteps)
    assert torch.equal(prev_timesteps, (timesteps - 1000 // steps).clamp(min=-1))
    assert prev_timesteps[-1] < timesteps[-1]


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, 1.0, "20"])
def test_impossible_numbers_of_steps_are_refused(tiny_model, steps):
    tiny_model.timesteps(1)  # True and 1.0 would find it under their own key
    with pytest.raises(ModelError, match=r"num_inference_steps is .*from 1 to 1000"):
        tiny_model.timesteps(steps)


def test_steps_past_the_end_of_the_schedule_are_refused(tiny_model):
    with pytest.raises(ModelError, match=r"num_inference_steps is 1000.*use fewer"):
        tiny_model.timesteps(1000)


@pytest.mark.parametrize(("height", "width", "field"), [(0, 32, "height"), (30, 32, "height"), (32, -4, "width")])
def test_sizes_that_are_no_whole_latents_are_refused(tiny_model, height, width, field):
    with pytest.raises(ModelError, match=f"{field} is .*multiple of 4"):
        tiny_model.latents_shape(height, width)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "addition_embed_type=None, SDXL base models",
        ),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline: use"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline: use .*StableDiffusionXLPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "is a StableDiffusionInpaintPipeline"),
        ("model_index.json", {"vae": ["os", "system"]}, r"vae is os\.system: use a class of"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "unet is a UNet2DModel"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("unet/config.json", {"in_channels": 9}, "cannot be loaded"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, r"time_cond_proj_dim=8 \(distilled guidance\).*have None: use"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'.*have None: use"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    ],
)
def test_models_of_another_kind_are_refused(copied: Path, file, changes, message):
    edit(copied / file, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(copied)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"requires_aesthetics_score": True},
            "requires_aesthetics_score=True.*SDXL refiner.*use an",
        ),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "InpaintPipeline: use"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "'text_time', Stable Diffusion 1 or 2 models"),
        ("model_index.json", {"text_encoder": [None, None]}, r"text_encoder is None\.None: use a class of"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "use .* CLIPTextModelWithProjection",
        ),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("unet/config.json", {"addition_time_embed_dim": 16}, "takes 68 added features.* give 116"),
    ],
)
def test_sdxl_models_of_another_kind_are_refused(tiny_sdxl_dir: Path, tmp_path: Path, file, changes, message):
    directory = Path(shutil.copytree(tiny_sdxl_dir, tmp_path / "sdxl"))
    edit(directory / file, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_schedule_without_betas_is_refused(copied: Path, kind):
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, "sigma_data": 0.5}))
    with pytest.raises(ModelError, match=f"a {kind}, states no beta_start"):
        load_model(copied)


def test_a_damaged_directory_is_refused(copied: Path):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(copied)
    (copied / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="no JSON"):
        load_model(copied)
    (copied / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load_model(copied)


def test_a_name_that_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no model at .*Hub id"):
        load_model(str(tmp_path / "nowhere"))


def test_a_scheduler_without_clip_sample_does_not_clip(copied: Path):
    file = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["clip_sample"]
    file.write_text(json.dumps(config))
    assert load_model(copied).clip_sample_range is None
    edit(file, clip_sample=True, clip_sample_range=2.0)
    assert load_model(copied).clip_sample_range == 2.0


def test_the_hash_is_that_of_content(copied: Path, tiny_sd_dir: Path):
    known = model_hash(tiny_sd_dir)
    assert model_hash(copied) == known
    (copied / "README.md").write_text("a card")
    assert model_hash(copied) == known
    edit(copied / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert model_hash(copied) != known


def test_the_hash_counts_what_is_loaded_and_no_more(copied: Path, tiny_sdxl_dir: Path, tmp_path: Path):
    known = model_hash(copied)
    shutil.copytree(copied / "text_encoder", copied / "text_encoder_2")
    assert model_hash(copied) == known
    sdxl = Path(shutil.copytree(tiny_sdxl_dir, tmp_path / "sdxl"))
    hashes = [model_hash(sdxl)]
    for part in ("unet", "text_encoder_2", "tokenizer_2"):
        (sdxl / part / "extra.json").write_text("{}")
        hashes.append(model_hash(sdxl))
    assert len(set(hashes)) == 4
    edit(sdxl / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ModelError, match="is a FluxPipeline"):
        model_hash(sdxl)


def test_the_hash_of_the_shipped_base_is_the_one_its_bundle_names():
    sprites = Path(str(files("blend.sprites")))
    bundle = json.loads((sprites / "registry" / "bundles" / "sprites" / "versions" / "000001.json").read_text())
    assert model_hash(sprites / "base") == bundle["base"]["sha256"]


def test_the_hash_needs_a_local_directory():
    with pytest.raises(ModelError, match="local diffusers directory"):
        model_hash("someone/some-model")
