"""What a UNet is conditioned on, per row: text embeddings and, for SDXL, pooled embeddings and sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_KEPT_PROMPTS = 1024


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The conditioning of R rows."""

    embeds: Tensor  # [R, L, D] the UNet's encoder_hidden_states
    # the UNet's added_cond_kwargs by name: SDXL's text_embeds [R, P] and time_ids [R, 6]; empty for SD 1 and 2
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def rows(self, index: Tensor) -> Conditioning:
        """Return the rows `index` [N]."""
        index = index.to(self.embeds.device)
        return Conditioning(self.embeds[index], {name: value[index] for name, value in self.added.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Return the rows of all parts, which are of one model."""
        added = {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added}
        return Conditioning(torch.cat([part.embeds for part in parts]), added)


class PromptEncoder:
    """The tokenizers and text encoders of a model. What they make of a prompt is kept for the prompts seen last.

    One CLIP encoder gives its last hidden states (SD 1 and 2). Two give their penultimate ones side by side and the
    second also its projected, pooled embedding (SDXL).
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[nn.Module],
        *,
        device: torch.device,
        dtype: torch.dtype,
        zeros_for_none: bool = False,
    ) -> None:
        """zeros_for_none: a missing negative prompt is zeros (SDXL's force_zeros_for_empty_prompt), not the text ""."""
        self.tokenizers = tuple(tokenizers)
        self.text_encoders = tuple(text_encoders)
        self._device = device
        self._dtype = dtype
        self._zeros_for_none = zeros_for_none
        self._kept: OrderedDict[str | None, tuple[Tensor, Tensor | None]] = OrderedDict()

    def encode(self, prompts: Sequence[str | None]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [B, L, D] and, with two encoders, pooled ones [B, P].

        None is the absent negative prompt. Text past a tokenizer's limit is cut off, as diffusers does. Each prompt is
        encoded alone, so that its bits do not depend on the others.
        """
        rows = [self._row(prompt if self._zeros_for_none else prompt or "") for prompt in prompts]
        pooled = [pooled for _, pooled in rows if pooled is not None]
        return torch.stack([embeds for embeds, _ in rows]), torch.stack(pooled) if pooled else None

    def _row(self, prompt: str | None) -> tuple[Tensor, Tensor | None]:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        # outside inference mode, even when called from it: training backpropagates through these
        with torch.inference_mode(False), torch.no_grad():
            if prompt is None:
                embeds, pooled = self._row("")
                row = torch.zeros_like(embeds), None if pooled is None else torch.zeros_like(pooled)
            else:
                row = self._encode(prompt)
        self._kept[prompt] = row
        if len(self._kept) > _KEPT_PROMPTS:
            self._kept.popitem(last=False)
        return row

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        two = len(self.text_encoders) == 2
        outputs = []
        for tokenizer, text_encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            # as diffusers: SDXL's encoders never see a mask
            uses_mask = not two and getattr(text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self._device) if uses_mask else None
            outputs.append(
                text_encoder(tokens.input_ids.to(self._device), attention_mask=mask, output_hidden_states=two)
            )
        if not two:
            return outputs[0][0][0].to(self._dtype), None
        hidden = torch.cat([output.hidden_states[-2][0] for output in outputs], dim=-1)
        return hidden.to(self._dtype), outputs[1][0][0].to(self._dtype)


def time_ids(height: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return SDXL's time_ids [6] of an image of that size in pixels: original size, crop's corner, target size."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=device)
