"""Keys and values of the text, computed once per (prompt, adapter) instead of at every step.

Cross-attention's to_k and to_v see the prompt alone. Each text row gets a table: what the base makes of it and what
each adapter adds; a UNet row then looks its keys and values up, or mixes them by its weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from blend.low_rank import Factors, Kept

if TYPE_CHECKING:
    from blend.adapters import AdapterBank

_KEPT_BYTES = 128 * 2**20  # of the tables of prompts seen before


def text_layers(unet: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that see the text embeddings as they come: cross-attention's to_k and to_v."""
    if getattr(unet, "encoder_hid_proj", None) is not None:
        return ()
    return tuple(
        f"{name}.{side}"
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        and module.is_cross_attention
        and module.norm_cross is None
        and module.added_kv_proj_dim is None
        and not module.fused_projections
        for side in ("to_k", "to_v")
        if isinstance(getattr(module, side), nn.Linear)
    )


@dataclass(frozen=True, slots=True)
class Lines:
    """How the keys and values of all layers lie in one line [N]."""

    shapes: Mapping[str, tuple[int, int]]  # layer -> (L, out), in the order of the line

    def outputs(self, lines: Tensor) -> dict[str, Tensor]:
        """Cut lines [R, N] into the outputs [R, L, out] of every layer, as views."""
        parts = lines.split([length * width for length, width in self.shapes.values()], dim=1)
        return {layer: part.view(-1, *shape) for (layer, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass(slots=True)
class TextKV:
    """The tables of P text rows."""

    tables: tuple[Tensor, ...]  # P of [K + 1, N]: the base's line, then what each adapter adds to it
    lines: Lines
    _kept: Kept = field(default_factory=Kept)  # rows see the same text, mostly under the same weights, step by step

    @staticmethod
    def cat(parts: Sequence[TextKV]) -> TextKV:
        """Return the text rows of all parts; copies nothing."""
        return TextKV(tuple(table for part in parts for table in part.tables), parts[0].lines)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def mixed(self, rows: Tensor, mix: Tensor) -> Tensor:
        """Return keys and values [R, N] of UNet rows that see text row `rows` [R] under `mix` [R, K], both on the CPU.

        Each row is summed by itself, so that its bits do not depend on the others.
        """
        texts, weights = tuple(rows.tolist()), tuple(map(tuple, mix.tolist()))
        return self._kept.get((texts, weights), lambda: self._mix(texts, weights))

    def _mix(self, rows: Sequence[int], mix: Sequence[Sequence[float]]) -> Tensor:
        lines = torch.stack([self.tables[row][0] for row in rows])
        for line, row, weights in zip(lines, rows, mix, strict=True):
            for delta, weight in zip(self.tables[row][1:], weights, strict=True):
                if weight != 0:
                    line.add_(delta, alpha=weight)
        return lines


def encode_text(layers: Mapping[str, nn.Linear], adapters: Sequence[Mapping[str, Factors]], embeds: Tensor) -> TextKV:
    """Compute the tables of embeds [P, L, D], each row alone, so that its bits do not depend on the others.

    adapters: the factors of each, as of one row.
    """
    lines = Lines({name: (embeds.shape[1], layer.out_features) for name, layer in layers.items()})
    tables = []
    for text in embeds:
        base = [functional.linear(text, layer.weight, layer.bias) for layer in layers.values()]
        table = [torch.cat([part.flatten() for part in base])]
        for factors in adapters:
            deltas = [_delta(text, factors.get(name), part) for name, part in zip(layers, base, strict=True)]
            table.append(torch.cat([part.flatten() for part in deltas]))
        tables.append(torch.stack(table))
    return TextKV(tuple(tables), lines)


def _delta(text: Tensor, factors: Factors | None, base: Tensor) -> Tensor:
    if factors is None:
        return torch.zeros_like(base)
    return functional.linear(text, factors.down[0]) @ factors.up[0]


class TextCache:
    """The tables of the prompts seen last, within a number of bytes, for the adapters that a bank now holds."""

    def __init__(self, bank: AdapterBank, limit: int = _KEPT_BYTES, *, steady: bool = False) -> None:
        """Batches whose tables exceed `limit` bytes get none and compute their keys and values.

        steady: whether they do must not depend on a row's company, as rounding differs: two tables alone decide.
        """
        self._bank = bank
        self._limit = limit
        self._steady = steady
        self._version = bank.version
        self._kept: OrderedDict[str | None, TextKV] = OrderedDict()
        self._bytes = 0

    def rows(self, prompts: Sequence[str | None], embeds: Tensor) -> TextKV | None:
        """Return the tables of `prompts` with embeddings [P, L, D]; None beyond the limit or with adapters in training.

        A prompt of None is the absent negative prompt.
        """
        if self._bank.trainable:
            return None
        if self._version != self._bank.version:
            self._kept.clear()
            self._version, self._bytes = self._bank.version, 0
        distinct = set(prompts)
        if (2 if self._steady else len(distinct)) * self._table_bytes(embeds) > self._limit:
            return None
        # what this batch needs is not what its own new prompts push out
        for prompt in distinct & self._kept.keys():
            self._kept.move_to_end(prompt)
        return TextKV.cat([self._row(prompt, one) for prompt, one in zip(prompts, embeds, strict=True)])

    def _table_bytes(self, embeds: Tensor) -> int:
        unet: Any = self._bank.unet
        width = sum(unet.get_submodule(layer).out_features for layer in text_layers(unet))
        return (len(self._bank.names) + 1) * embeds.shape[1] * width * embeds.element_size()

    def _row(self, prompt: str | None, embeds: Tensor) -> TextKV:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        text = self._kept[prompt] = self._bank.encode_text(embeds[None])
        self._bytes += text.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return text
