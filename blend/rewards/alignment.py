"""Alignment of a sprites picture with its caption: a small text-image dual encoder trained on renders.

After CLIP (Radford et al. 2021): the cosine of two embeddings. For pictures of the sprites world alone; trained by
blend.sprites.train_alignment with hard captions and corrupted pictures as negatives, and never used as a judge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from blend.rewards import RewardError, check_images
from blend.sprites.captions import COLOURS, OBJECTS
from blend.sprites.vision import ImageEncoder, load_half

WEIGHTS = Path(__file__).parent / "alignment.safetensors"
EMBEDDING = 64
_WORDS = ("", "?", *sorted({word for name in (*COLOURS, *OBJECTS) for word in name.split()} | {"and"}))
_LENGTH = 8
_FILLER = {"a", "an", "colored"}


class DualEncoder(nn.Module):
    """Unit embeddings of pictures and captions whose inner product is high where they match."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageEncoder(192)
        self.image_head = nn.Linear(192, EMBEDDING)
        self.words = nn.Embedding(len(_WORDS), EMBEDDING)
        self.positions = nn.Parameter(0.1 * torch.randn(_LENGTH, EMBEDDING))
        self.text = nn.Sequential(
            nn.Linear(_LENGTH * EMBEDDING, 256),
            nn.SiLU(),
            nn.Linear(256, 256),
            nn.SiLU(),
            nn.Linear(256, EMBEDDING),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def embed_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [0, 1] to unit vectors [B, EMBEDDING]."""
        return functional.normalize(self.image_head(self.image(images)), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Captions to unit vectors [B, EMBEDDING]; words outside the grammar count as unknown."""
        tokens = torch.tensor([_tokens(prompt) for prompt in prompts], device=self.positions.device)
        return functional.normalize(self.text((self.words(tokens) + self.positions).flatten(1)), dim=-1)


class Alignment:
    """Cosine of picture and caption in the dual encoder's space, in [-1, 1]."""

    name = "alignment"
    version = "1"
    range = (-1.0, 1.0)
    differentiable = True

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def shipped(cls) -> Alignment:
        """The encoder that comes with the package."""
        encoder = DualEncoder()
        load_half(encoder, WEIGHTS)
        return cls(encoder)

    def to(self, device: str) -> Alignment:
        """Compute on this device from now on; images may come from any."""
        self.encoder.to(device)
        self._texts.clear()
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        if images.shape[2:] != (64, 64):
            raise RewardError(
                f"alignment scores 64 x 64 pictures of the sprites world, not {images.shape[3]} x {images.shape[2]}; "
                "use a CLIP-style reward for other models"
            )
        for prompt in set(prompts) - self._texts.keys():
            self._texts[prompt] = self.encoder.embed_prompts([prompt])[0]
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        return (self.encoder.embed_images(images.to(texts.device, torch.float32)) * texts).sum(-1)


def _tokens(prompt: str) -> list[int]:
    words = [word for word in re.findall(r"[a-z]+", prompt.lower()) if word not in _FILLER]
    known = [_WORDS.index(word) if word in _WORDS else 1 for word in words[:_LENGTH]]
    return known + [0] * (_LENGTH - len(known))
