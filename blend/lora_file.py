"""LoRA files: reads what diffusers, peft and kohya write, writes diffusers' own `pytorch_lora_weights.safetensors`.

Knows tensors and names, not UNets: whether a layer exists and fits is the bank's business.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
BASE_HASH_KEY = "base_model_hash"
_FACTOR = re.compile(r"(?P<layer>.+?)\.lora(?:_|\.)(?P<side>A|B|down|up)\.weight$")
# attention layers as attention processors once named them; diffusers' kohya converter still does
_PROCESSOR_FACTOR = re.compile(r"(?P<layer>.+)\.processor\.(?P<to>to_\w+)_lora\.(?P<side>down|up)\.weight$")
_KOHYA_UNET = "lora_unet_"
_TEXT = ("text_encoder", "lora_te_", "lora_te1_", "lora_te2_")
_UNSUPPORTED = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "dora_scale": "a DoRA magnitude",
    "lora_B.bias": "a LoRA bias",
    "lokr_": "a LoKr factor",
    "hada_": "a LoHa factor",
}


class AdapterError(ValueError):
    """An adapter that cannot be read, does not fit the base model, or is not known."""


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer's factors: the weight gains scale * up @ down."""

    down: Tensor  # [r, in] ([r, in, k, k] for a convolution)
    up: Tensor  # [out, r]
    alpha: float
    scale: float  # alpha / r, or alpha / sqrt(r) for a rank-stabilised adapter

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A parsed adapter: UNet layer name -> factors, and the file's own header."""

    layers: dict[str, LoraLayer]
    header: dict[str, str]


def read_lora(path: str | Path, *, layers_per_block: int = 2) -> LoraFile:
    """Read an adapter file, or a directory that holds WEIGHT_NAME.

    layers_per_block is the UNet's: kohya's names of SDXL layers count through its blocks.
    Raises AdapterError when the file is missing, is no safetensors file, is damaged, holds values that are not finite,
    or anything but LoRA factors of a UNet.
    """
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHT_NAME
    if not file.is_file():
        raise AdapterError(f"no adapter at {file}: give a .safetensors file or a directory that holds {WEIGHT_NAME}")
    try:
        with safe_open(file, framework="pt") as opened:
            header = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is not a readable safetensors file ({error}): publish or download it again"
        ) from error
    tensors, alphas = _split_alphas(_from_kohya(tensors, layers_per_block, file))
    factors = _pair_factors(tensors, file)
    scales = _read_scales(header, alphas, file)
    layers = {}
    for layer, (down, up) in factors.items():
        if not (down.isfinite().all() and up.isfinite().all()):
            raise AdapterError(f"{file}: layer {layer} holds values that are not finite: train or download it again")
        alpha, stabilised = scales(layer, down.shape[0])
        divisor = math.sqrt(down.shape[0]) if stabilised else down.shape[0]
        layers[layer] = LoraLayer(down, up, alpha, alpha / divisor)
    return LoraFile(layers, header)


def write_lora(directory: str | Path, layers: Mapping[str, LoraLayer], metadata: Mapping[str, str]) -> Path:
    """Write `layers` as diffusers does into directory/WEIGHT_NAME, whole or not at all; returns the file's path.

    `metadata` goes into the header beside diffusers' own entry, which carries ranks and alphas.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = layer.down.detach().float().cpu().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = layer.up.detach().float().cpu().contiguous()
    first = next(iter(layers.values()))
    config = {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "use_rslora": not math.isclose(first.scale, first.alpha / first.rank),
    }
    prefixed = {f"unet.{key}": value for key, value in config.items()}
    header = {**metadata, "format": "pt", METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}
    file, partial = directory / WEIGHT_NAME, directory / f".{WEIGHT_NAME}.{os.getpid()}"
    try:
        _save(tensors, partial, header)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def write_kohya(source: str | Path, target: str | Path, metadata: Mapping[str, str]) -> Path:
    """Write the adapter at `source` as one file with kohya's names, which ComfyUI and A1111 read.

    `metadata` goes into the header. Raises AdapterError when `source` cannot be read; leaves no half-written file.
    """
    # diffusers owns the mapping to kohya's flattened names; its import is heavy and rarely needed
    from diffusers.utils import convert_state_dict_to_kohya

    layers = read_lora(source).layers
    factors = {}
    for name, layer in layers.items():
        factors[f"unet.{name}.lora_A.weight"] = layer.down.detach().float().cpu().contiguous()
        factors[f"unet.{name}.lora_B.weight"] = layer.up.detach().float().cpu().contiguous()
    tensors = convert_state_dict_to_kohya(factors)
    for name, layer in layers.items():
        # kohya multiplies by alpha / rank, whatever the adapter was scaled by in training
        key = f"{_KOHYA_UNET}{name.replace('.', '_')}.alpha"
        if key not in tensors:
            raise AdapterError(f"{source}: layer {name} has no name in kohya's layout: export it as a diffusers LoRA")
        tensors[key] = torch.tensor(layer.scale * layer.rank)
    target = Path(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _save({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _save(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """The same bytes for the same content: safetensors alone writes its metadata in an order drawn anew each time."""
    data = save(tensors, metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _from_kohya(tensors: dict[str, Tensor], layers_per_block: int, file: Path) -> dict[str, Tensor]:
    if not tensors or not all(key.startswith((_KOHYA_UNET, *_TEXT)) for key in tensors):
        return tensors
    _refuse_text(tensors, file)
    # diffusers owns the mapping from kohya's flattened names; its import is heavy and rarely needed
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        converted, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=config)
    except (ValueError, LookupError) as error:
        raise AdapterError(
            f"{file} has kohya's names but not its layers ({error}): convert it to diffusers' layout"
        ) from error
    return {**converted, **{key: torch.tensor(float(value)) for key, value in (alphas or {}).items()}}


def _refuse_text(keys: Iterable[str], file: Path) -> None:
    for key in keys:
        if key.startswith(_TEXT):
            raise AdapterError(
                f"{file}: {key} adapts a text encoder, which all adapters of a blend share: use an adapter trained on"
                " the UNet alone, with keys such as unet.<layer>.lora_A.weight"
            )


def _split_alphas(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    alphas = {}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        name = key.removesuffix(".alpha")
        layer, _ = _parse(name) or (name.removeprefix("unet."), "")
        alphas[layer] = float(tensors[key])
    return {key: value for key, value in tensors.items() if not key.endswith(".alpha")}, alphas


def _parse(key: str) -> tuple[str, str] | None:
    """Return (layer, "down" | "up") of a factor's key."""
    old = _PROCESSOR_FACTOR.match(key)
    if old:
        to = "to_out.0" if old["to"] == "to_out" else old["to"]
        return f"{old['layer']}.{to}".removeprefix("unet."), old["side"]
    match = _FACTOR.match(key)
    if match is None:
        return None
    return match["layer"].removeprefix("unet."), "down" if match["side"] in ("A", "down") else "up"


def _pair_factors(tensors: dict[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    _refuse_text(tensors, file)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for part, meaning in _UNSUPPORTED.items():
            if part in key:
                raise AdapterError(f"{file}: {key} is {meaning}, which is not supported: use a plain LoRA adapter")
        parsed = _parse(key)
        if parsed is None:
            raise AdapterError(
                f"{file}: {key} is no LoRA factor of a UNet layer: use an adapter trained on the UNet alone, with keys"
                " such as unet.<layer>.lora_A.weight"
            )
        layer, side = parsed
        halves.setdefault(layer, {})[side] = tensor
    if not halves:
        raise AdapterError(f"{file} holds no LoRA factors: use a file with keys such as unet.<layer>.lora_A.weight")
    for layer, sides in halves.items():
        if len(sides) != 2:
            raise AdapterError(f"{file}: layer {layer} has a {next(iter(sides))} factor alone: the file is incomplete")
        if sides["down"].shape[0] != sides["up"].shape[1]:
            raise AdapterError(
                f"{file}: layer {layer} has factors of rank {sides['down'].shape[0]} and {sides['up'].shape[1]}:"
                " they must be equal"
            )
    return {layer: (sides["down"], sides["up"]) for layer, sides in halves.items()}


class _Scales:
    """Looks up a layer's alpha as peft does: by pattern, else the adapter's own, else its rank."""

    def __init__(self, config: Mapping[str, Any], alphas: Mapping[str, float]) -> None:
        self._patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        self._default: float | None = config.get("lora_alpha")
        self._stabilised = bool(config.get("use_rslora"))
        self._alphas = alphas

    def __call__(self, layer: str, rank: int) -> tuple[float, bool]:
        if layer in self._alphas:
            return self._alphas[layer], False
        for pattern, alpha in self._patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return float(alpha), self._stabilised
        return float(rank if self._default is None else self._default), self._stabilised


def _read_scales(header: Mapping[str, str], alphas: Mapping[str, float], file: Path) -> _Scales:
    try:
        config = json.loads(header.get(METADATA_KEY) or "{}")
        unet = {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{file}: its {METADATA_KEY} header is no JSON object ({error}): save it again") from error
    if unet.get("use_dora"):
        raise AdapterError(f"{file} is a DoRA adapter, which is not supported: use a plain LoRA adapter")
    return _Scales(unet, alphas)
