"""Loaded tiny models and banks of adapters, shared and never changed by a test; trainers, made anew for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from blend.adapters import AdapterBank
from blend.finetune.config import TrainConfig
from blend.finetune.trainer import Trainer
from blend.finetune.workgroup import Workgroup
from blend.model import DiffusionModel, load_model
from blend.rewards import Reward, load_reward


@pytest.fixture(scope="session")
def adapter_dirs(tiny_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_lora(root / name, seed, rank) for name, seed, rank in (("a", 1, 4), ("b", 2, 2), ("c", 3, 3))}


@pytest.fixture(scope="session")
def tiny_model(tiny_sd_dir: Path) -> DiffusionModel:
    return load_model(tiny_sd_dir)


@pytest.fixture(scope="session")
def tiny_bank(tiny_model: DiffusionModel, adapter_dirs: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(tiny_model.unet)
    for name, path in adapter_dirs.items():
        bank.load(name, path)
    return bank


@pytest.fixture
def fresh_bank(tiny_sd_dir: Path) -> AdapterBank:
    """A bank without adapters, the test's own."""
    return AdapterBank(load_model(tiny_sd_dir).unet)


@pytest.fixture(scope="session")
def tiny_sdxl_dir(tiny_sd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionXLPipeline with random weights under a seed: 8 x 8 latents, 32 x 32 pixels."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd_dir / "tokenizer")
    shape = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = CLIPTextConfig(hidden_size=32, num_hidden_layers=2, **shape)
        second = CLIPTextConfig(hidden_size=24, num_hidden_layers=3, projection_dim=20, hidden_act="gelu", **shape)
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(8, 16, 16),
                norm_num_groups=4,
                sample_size=32,
                scaling_factor=0.13025,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            ),
            text_encoder=CLIPTextModel(first),
            text_encoder_2=CLIPTextModelWithProjection(second),
            tokenizer=tokenizer,
            # as SDXL's own: the second pads with another token
            tokenizer_2=CLIPTokenizer.from_pretrained(tiny_sd_dir / "tokenizer", pad_token="!"),
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=32 + 24,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 20,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )
    directory = tmp_path_factory.mktemp("tiny_sdxl")
    pipeline.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def sdxl_adapter_dirs(tiny_sdxl_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of attention and feed-forward layers, made by peft and saved by diffusers' SDXL pipeline."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    root, directories = tmp_path_factory.mktemp("sdxl_adapters"), {}
    for seed, name in enumerate(("a", "b"), start=1):
        unet = UNet2DConditionModel.from_pretrained(tiny_sdxl_dir, subfolder="unet")
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in"]
        unet.add_adapter(LoraConfig(r=2 + seed, lora_alpha=4, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in unet.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        StableDiffusionXLPipeline.save_lora_weights(root / name, get_peft_model_state_dict(unet))
        directories[name] = root / name
    return directories


@pytest.fixture(scope="session")
def tiny_sdxl_model(tiny_sdxl_dir: Path) -> DiffusionModel:
    return load_model(tiny_sdxl_dir)


@pytest.fixture(scope="session")
def tiny_sdxl_bank(tiny_sdxl_model: DiffusionModel, sdxl_adapter_dirs: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(tiny_sdxl_model.unet)
    for name, path in sdxl_adapter_dirs.items():
        bank.load(name, path)
    return bank


class Redness:
    """Mean of red minus the rest: a reward that an untrained model can move."""

    name, version, range, differentiable = "redness", "1", (-1.0, 1.0), True

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture
def redness() -> Redness:
    return Redness()


FINETUNING = {
    "name": "colour",
    "reward": "colourfulness",
    "prompts": ("A red colored car.", "A blue colored cup.", "A green colored bird."),
    "held_out_prompts": ("A red colored cup.", "A green colored car."),
    "held_out_images": 4,
    "rank": 2,
    "iterations": 3,
    "prompts_per_iteration": 2,
    "images_per_prompt": 3,
    "num_inference_steps": 4,
    "train_steps_per_sample": 2,
    "eval_every": 2,
    "learning_rate": 1e-2,
    "num_workers": 0,
}


@pytest.fixture
def make_trainer(tiny_sd_dir: Path) -> Callable[..., Trainer]:
    """A trainer of a tiny model: make(reward, workgroup, base_model, watched, precision, **settings)."""

    def make(
        reward: Reward | None = None,
        /,
        workgroup: Workgroup | None = None,
        base_model: Path = tiny_sd_dir,
        watched: Mapping[str, Reward] | None = None,
        precision: torch.dtype = torch.float32,
        **changes: object,
    ) -> Trainer:
        config = TrainConfig.parse({**FINETUNING, "base_model": str(base_model), **changes})
        model, reward = load_model(base_model, dtype=precision), reward or load_reward(config.reward)
        return Trainer(config, model, reward, config.prompts, config.held_out_prompts, workgroup, watched=watched)

    return make
