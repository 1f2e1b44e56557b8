"""Trains the world's autoencoder: diffusers' AutoencoderTiny, 64 x 64 pixels to 16 x 16 latents.

Latents are kept near unit variance per channel by a batch penalty, and noise is added to them in training, so that
a diffusion model may use them as they are and small errors decode to small errors.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from blend.sprites.captions import sample_things
from blend.sprites.scene import render_things

LATENT_CHANNELS = 4
_CROP = 32
_NOISE = 0.08


def build_codec(latent_channels: int = LATENT_CHANNELS, width: int = 32) -> AutoencoderTiny:
    """A fresh autoencoder with downsampling factor 4 and `width` channels in every block."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=latent_channels,
        scaling_factor=1.0,
    )


def save_codec(codec: AutoencoderTiny, directory: Path) -> None:
    """Write the autoencoder in diffusers' format."""
    codec.save_pretrained(directory)
    clean_config(directory)


def clean_config(directory: Path) -> None:
    """Drop where the weights came from, and block_out_channels, which diffusers writes and then warns of."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key in ("_name_or_path", "block_out_channels"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def render_batch(count: int, rng: random.Random, *, pair_share: float = 0.5) -> Tensor:
    """Training scenes as float32 [count, 3, 64, 64] in [-1, 1]."""
    pixels = np.stack([render_things(sample_things(rng, pair_share=pair_share), rng) for _ in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train_codec(
    codec: AutoencoderTiny,
    *,
    steps: int,
    batch: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    decoder_only: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Train on random 32-pixel crops of fresh scenes; returns the PSNR in dB over 64 unseen whole scenes.

    With `decoder_only` the encoder, and so every latent, stays as it is.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    codec.encoder.requires_grad_(not decoder_only)
    trained = codec.decoder.parameters() if decoder_only else codec.parameters()
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    codec.train()
    for step in range(steps):
        loss = _codec_loss(codec, _crops(render_batch(batch, rng), rng), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
    codec.eval()
    return measure_psnr(codec, render_batch(64, random.Random(seed + 1)))


def measure_psnr(codec: AutoencoderTiny, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the round trip, images [B, 3, H, W] in [-1, 1]."""
    with torch.no_grad():
        decoded = codec.decode(codec.encode(images).latents).sample.clamp(-1, 1)
    return -10 * math.log10(float(functional.mse_loss(decoded, images)) / 4)


def _codec_loss(codec: AutoencoderTiny, images: Tensor, generator: torch.Generator) -> Tensor:
    latents = codec.encode(images).latents
    noisy = latents + _NOISE * torch.randn(latents.shape, generator=generator)
    decoded = codec.decode(noisy).sample
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    spread = (mean.square() + (variance - 1).square()).mean()
    detail = functional.mse_loss(_edges(decoded), _edges(images))
    return (
        functional.mse_loss(decoded, images) + 0.3 * functional.l1_loss(decoded, images) + 0.3 * detail + 0.01 * spread
    )


def _edges(images: Tensor) -> Tensor:
    """Horizontal and vertical neighbour differences, [B, 3, H-1, W-1] each, stacked on channels."""
    across = images[:, :, :-1, 1:] - images[:, :, :-1, :-1]
    down = images[:, :, 1:, :-1] - images[:, :, :-1, :-1]
    return torch.cat([across, down], dim=1)


def _crops(images: Tensor, rng: random.Random) -> Tensor:
    corners = [(4 * rng.randrange(9), 4 * rng.randrange(9)) for _ in images]
    return torch.stack([image[:, y : y + _CROP, x : x + _CROP] for image, (y, x) in zip(images, corners, strict=True)])


def _warm_cosine(step: int, steps: int, warmup: int = 100) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
