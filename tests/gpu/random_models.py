"""Models of the real architectures with random weights, made on the spot: nothing is downloaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from blend.adapters import AdapterBank

TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """One architecture: what diffusers' classes need to be told, beyond their defaults."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    second_text: dict[str, Any] | None = None  # the second text encoder, for architectures with added conditions

    @property
    def pooled(self) -> int:
        """Width of the pooled text embedding; 0 where there is none."""
        return self.second_text["projection_dim"] if self.second_text else 0

    def side(self, pixels: int) -> int:
        """Latent cells along one side."""
        return pixels // 8


_SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "vocab_size": 49408,
    "projection_dim": 1280,
}
_TINY_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TINY_VAE = {
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_ADDED = {"addition_embed_type": "text_time", "use_linear_projection": True}
SHAPES = {
    "tiny": Shape({**_TINY_UNET, "cross_attention_dim": 32, "attention_head_dim": 8}, _TINY_VAE, _TINY_TEXT),
    "tiny-xl": Shape(
        {
            **_TINY_UNET,
            **_ADDED,
            "cross_attention_dim": 64,
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        _TINY_VAE,
        _TINY_TEXT,
        {**_TINY_TEXT, "projection_dim": 32},
    ),
    "sd15": Shape({"cross_attention_dim": 768, "attention_head_dim": 8}, _SD15_VAE, _CLIP_L),
    "sdxl": Shape(
        {
            **_ADDED,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _SD15_VAE,
        _CLIP_L,
        _CLIP_BIG_G,
    ),
}


def random_unet(size: str, pixels: int, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of an architecture, drawn on the device itself."""
    torch.manual_seed(0)
    shape = SHAPES[size]
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=shape.side(pixels), **shape.unet)
    return unet.to(dtype).requires_grad_(False).eval()


def random_bank(unet: nn.Module, adapters: int, rank: int = 4) -> AdapterBank:
    """K frozen adapters on every attention layer whose B is not zero."""
    bank = AdapterBank(unet)
    for index in range(adapters):
        generator = torch.Generator().manual_seed(index)
        for parameter in bank.add_trainable(f"adapter{index}", rank=rank, seed=index):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False).add_(0.02 * noise.to(parameter.device))
    return bank


@dataclass(frozen=True)
class Rows:
    """UNet rows: latents [R, 4, s, s], timesteps [R], text [R, 77, D], what else the UNet sees, mix [R, K]."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    added: dict[str, Tensor]
    mix: Tensor  # on the CPU, as the engine plans it

    def take(self, index: Tensor) -> "Rows":
        device = index.to(self.latents.device)
        added = {name: value[device] for name, value in self.added.items()}
        return Rows(self.latents[device], self.timesteps[device], self.text[device], added, self.mix[index])


def random_rows(unet: UNet2DConditionModel, size: str, count: int, adapters: int, seed: int = 1) -> Rows:
    """Rows of which each uses one adapter by turns."""
    generator = torch.Generator().manual_seed(seed)
    side, device, dtype = unet.config.sample_size, unet.device, unet.dtype
    latents = torch.randn(count, 4, side, side, generator=generator).to(device, dtype)
    text = torch.randn(count, TOKENS, unet.config.cross_attention_dim, generator=generator).to(device, dtype)
    timesteps = torch.randint(0, 1000, (count,), generator=generator).to(device)
    added, pooled = {}, SHAPES[size].pooled
    if pooled:
        added["text_embeds"] = torch.randn(count, pooled, generator=generator).to(device, dtype)
        added["time_ids"] = torch.full((count, 6), 8.0 * side, device=device, dtype=dtype)
    mix = torch.eye(adapters)[torch.arange(count) % adapters]
    return Rows(latents, timesteps, text, added, mix)


def save_pipeline(size: str, pixels: int, directory: Path, dtype: torch.dtype) -> Path:
    """Write a pipeline of the architecture's own class, with random weights, for `load_model`."""
    shape = SHAPES[size]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_tokenizer(directory / "characters")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    parts = {
        "unet": random_unet(size, pixels, "cpu", dtype),
        "vae": AutoencoderKL(sample_size=pixels, **shape.vae).to(dtype),
        "text_encoder": CLIPTextModel(_text_config(shape.text, tokenizer, special)).to(dtype),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    }
    if shape.second_text:
        second = CLIPTextModelWithProjection(_text_config(shape.second_text, tokenizer, special)).to(dtype)
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(directory)
    return directory


def _text_config(width: dict[str, Any], tokenizer: CLIPTokenizer, special: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(**{"vocab_size": len(tokenizer), **width, **special})


def _byte_tokenizer(directory: Path) -> CLIPTokenizer:
    directory.mkdir(parents=True)
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=TOKENS)
