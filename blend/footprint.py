"""How much memory UNet rows take while they run, and so how many of them one tile may have.

A row takes what its activations take at their peak, its adapters' factors and its text's keys and values. On a CPU the
peak is counted without computing: the UNet runs on tensors without data, and every allocation is counted while it
lives. That is within 2 % of what forwards of 50 MB and more took. On CUDA one row runs and is measured.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blend.adapters import AdapterBank
from blend.conditioning import Conditioning
from blend.model import DiffusionModel
from blend.sample import SampleError
from blend.text_kv import text_layers

_FREE_SHARE = 0.9  # of a GPU's free memory; the rest is for decoding and what fragments
_WORKING = 32  # tensors of a level's width that live at once, at most; a feed-forward layer's take 18


class Room:
    """How many rows of a latent shape fit the memory that one tile may take."""

    def __init__(self, model: DiffusionModel, bank: AdapterBank, *, wanted: int, memory_bytes: int | None) -> None:
        """wanted: rows of the largest tile; memory_bytes: see BlendEngine. ValueError unless it is an integer >= 1."""
        if memory_bytes is not None and (not isinstance(memory_bytes, int) or memory_bytes < 1):
            raise ValueError(f"memory_bytes is {memory_bytes!r}: use an integer >= 1")
        self.memory_bytes = default_memory(model.device) if memory_bytes is None else memory_bytes
        self._model = model
        self._bank = bank
        self._wanted = wanted
        self._version = bank.version
        self._kept: dict[tuple[int, ...], int] = {}

    def rows(self, shape: Sequence[int], conditioning: Conditioning) -> int:
        """Return how many rows of shape (C, h, w) fit; the very number only where the tile wanted does not.

        It is the same at every call, whatever else runs.
        """
        return self.memory_bytes // self._bytes(tuple(shape), conditioning)

    def check(self, shape: Sequence[int], conditioning: Conditioning) -> None:
        """Raise SampleError unless at least one row fits."""
        if self.rows(shape, conditioning):
            return
        needed, factor = self._bytes(tuple(shape), conditioning), self._model.vae_scale_factor
        height, width = shape[1] * factor, shape[2] * factor
        param = "height" if height >= width else "width"
        # attention may grow faster than the area, so that an image with this share of the area fits all the more
        carried = _carried_bytes(self._bank, conditioning)
        share = max(0, self.memory_bytes - carried) / max(1, needed - carried)
        config: Any = self._bank.unet.config
        multiple = factor * 2 ** (len(config.block_out_channels) - 1)
        side = int(math.sqrt(height * width * share)) // multiple * multiple
        smaller = f"use at most about {side} x {side}, or " if side else "no size fits; use "
        raise SampleError(
            f"{param} is {max(height, width)}: one UNet row of {width} x {height} pixels takes {_written(needed)} while"
            f" it runs and there are {_written(self.memory_bytes)} for them: {smaller}an engine with more memory_bytes",
            param,
        )

    def _bytes(self, shape: tuple[int, ...], conditioning: Conditioning) -> int:
        if self._version != self._bank.version:
            self._kept, self._version = {}, self._bank.version
        if shape not in self._kept:
            most = bound_bytes(self._bank, shape, conditioning)
            # most engines have memory to spare: they need not know how much
            enough = most * self._wanted <= self.memory_bytes
            self._kept[shape] = most if enough else row_bytes(self._bank, shape, conditioning)
        return self._kept[shape]


def default_memory(device: torch.device) -> int:
    """Return the bytes that a tile may take: 90 % of a GPU's free memory; elsewhere half of the machine's."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_FREE_SHARE * free)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def row_bytes(bank: AdapterBank, shape: Sequence[int], conditioning: Conditioning) -> int:
    """Return the bytes that one row of shape (C, h, w) takes while it runs; n rows take n times that, or less.

    `conditioning` is that of any rows. On CUDA this runs a forward, and counts if that runs out of memory; elsewhere it
    only counts, in 0.3 s for sprites and 2 s for SDXL.
    """
    if conditioning.embeds.device.type == "cuda":
        with suppress(torch.cuda.OutOfMemoryError), torch.inference_mode(False), torch.no_grad():
            return _measure(bank, shape, conditioning)
    return count_bytes(bank, shape, conditioning)


def count_bytes(bank: AdapterBank, shape: Sequence[int], conditioning: Conditioning, rows: int = 1) -> int:
    """Return the most bytes that live at once while `rows` rows run, counted without computing."""
    widths = _widths(bank)
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.no_grad(), without_data, _Counter() as counter:
        bank.predict(**_rows(bank, shape, conditioning, widths, rows))
    return counter.peak


def bound_bytes(bank: AdapterBank, shape: Sequence[int], conditioning: Conditioning) -> int:
    """Return at once a number of bytes that `row_bytes` does not exceed: 2 to 20 times it, more for large images."""
    config: Any = bank.unet.config
    layers = config.layers_per_block
    layers = layers if isinstance(layers, int) else max(layers)
    cells = shape[1] * shape[2]
    # each level keeps what its layers hand over to the other half of the UNet
    levels = enumerate(config.block_out_channels)
    features = sum((layers + _WORKING) * width * max(1, cells / 4**level) for level, width in levels)
    heads = max((module.heads for module in bank.unet.modules() if isinstance(module, Attention)), default=0)
    # as if attention kept its whole matrix, before, in and after its softmax
    itemsize = max(4, conditioning.embeds.element_size())
    return _carried_bytes(bank, conditioning) + itemsize * math.ceil(features + 3 * heads * cells**2)


class _Counter(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # an alias is a view, of a weight even, or what was written in place
        if not any(value.alias_info for value in func._schema.returns):
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            self._live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self._live += size
        self.peak = max(self.peak, self._live)


def _measure(bank: AdapterBank, shape: Sequence[int], conditioning: Conditioning) -> int:
    device, widths = conditioning.embeds.device, _widths(bank)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    bank.predict(**_rows(bank, shape, conditioning, widths, 1))
    return torch.cuda.max_memory_allocated(device) - before


def _rows(
    bank: AdapterBank, shape: Sequence[int], conditioning: Conditioning, widths: Sequence[int], rows: int
) -> dict[str, Any]:
    """Return the arguments of `AdapterBank.predict` for rows that mix all adapters, the heaviest there are."""
    embeds = conditioning.embeds

    def zeros(*sizes: int, like: Tensor = embeds) -> Tensor:
        return torch.zeros(rows, *sizes, dtype=like.dtype, device=embeds.device)

    added: Mapping[str, Tensor] = conditioning.added
    return {
        "sample": zeros(*shape),
        "timesteps": torch.zeros(rows, dtype=torch.long, device=embeds.device),
        "encoder_hidden_states": zeros(*embeds.shape[1:]),
        "factors": [zeros(width) for width in widths],
        "outputs": {name: zeros(embeds.shape[1], width) for name, width in _text_widths(bank).items()},
        "added_cond_kwargs": {name: zeros(*value.shape[1:], like=value) for name, value in added.items()},
    }


def _widths(bank: AdapterBank) -> list[int]:
    """Return how many numbers each adapter's factors are, per row."""
    with torch.no_grad():
        return [lines.shape[1] for lines in bank.gather(torch.ones(1, len(bank.names)))]


def _text_widths(bank: AdapterBank) -> dict[str, int]:
    layers: dict[str, Any] = {name: bank.unet.get_submodule(name) for name in text_layers(bank.unet)}
    return {name: layer.out_features for name, layer in layers.items()}


def _carried_bytes(bank: AdapterBank, conditioning: Conditioning) -> int:
    """Return the bytes of what a row brings along whatever its shape: factors, its text's keys and values and so on."""
    embeds = conditioning.embeds
    text = embeds.shape[1] * (embeds.shape[2] + sum(_text_widths(bank).values()))
    added = sum(value[0].nbytes for value in conditioning.added.values())
    return added + embeds.element_size() * (sum(_widths(bank)) + text)


def _written(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
