"""The files of a diffusers model directory or Hub id: which kinds will do, their parts, and their identity."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blend.ddim import PREDICTION_TYPES

_HASHED = {".safetensors", ".json", ".txt"}
_CLASSES = {"unet": "UNet2DConditionModel", "text_encoder_2": "CLIPTextModelWithProjection"}


class ModelError(ValueError):
    """A base model that cannot be loaded or whose kind the blend does not support."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A diffusers pipeline class whose models will do."""

    name: str
    parts: tuple[str, ...]  # what is loaded, and counted by the hash
    addition_embed_type: str | None  # the UNet's
    size_ids: int = 0  # numbers in the UNet's time_ids

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders among the parts."""
        return tuple(part for part in self.parts if part.startswith("text_encoder"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers among the parts, in the order of the encoders."""
        return tuple(part for part in self.parts if part.startswith("tokenizer"))


_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_KINDS = {
    "StableDiffusionPipeline": Kind("Stable Diffusion 1 or 2", _PARTS, None),
    "StableDiffusionXLPipeline": Kind("SDXL base", (*_PARTS, "text_encoder_2", "tokenizer_2"), "text_time", 6),
}


def kind_of(source: str | Path, index: Mapping[str, Any]) -> Kind:
    """Return the kind that a model_index.json names; ModelError if it is none of ours."""
    name = index.get("_class_name")
    if index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{source} has requires_aesthetics_score=True, which makes it an SDXL refiner: it can only finish another"
            " model's images; use an SDXL base model, where it is false or absent"
        )
    if name not in _KINDS:
        raise ModelError(f"{source} is a {name}: use a directory or Hub id of a {' or a '.join(_KINDS)}")
    return _KINDS[name]


def read_index(source: str | Path) -> dict[str, Any]:
    """Return the model_index.json of a directory or Hub id; ModelError when there is none."""
    directory = Path(source)
    if directory.is_dir():
        file = directory / "model_index.json"
        if not file.is_file():
            raise ModelError(f"{source} holds no model_index.json: give the top folder of a diffusers model")
        try:
            index: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise ModelError(f"{file} is no JSON ({error}): download or save the model again") from error
        return index
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(str(source)))
    except Exception as error:
        raise ModelError(
            f"no model at {source!r}: give an existing diffusers directory or a reachable Hub id ({error})"
        ) from error


def load_parts(source: str | Path, kind: Kind, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts of a model on the CPU, by name; the scheduler always as a DDIMScheduler.

    Raises ModelError for parts that are missing, damaged, or of another kind.
    """
    try:
        # before any weights, which may be many gigabytes
        _check_unet(source, kind, _load_config(source, "unet", index))
        parts = {part: _load_part(source, part, index, dtype) for part in kind.parts}
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source} cannot be loaded ({error}): download or save the model again") from error
    _check_parts(source, kind, parts)
    _check_schedule(source, parts["scheduler"].config)
    return parts


def model_hash(source: str | Path) -> str:
    """Return the base model's identity: sha256 over the sorted (relative name, sha256) of what it is made of.

    Counted are model_index.json and the .safetensors, .json and .txt files of the parts that are loaded; model cards
    and safety checkers may change freely. Raises ModelError unless `source` is a local diffusers directory of a kind
    that will do.
    """
    root = Path(source)
    if not (root / "model_index.json").is_file():
        raise ModelError(f"{source} is no local diffusers directory: give one that holds model_index.json")
    parts = kind_of(source, read_index(root)).parts
    files = [root / "model_index.json"]
    files += [file for part in parts for file in (root / part).rglob("*") if file.suffix in _HASHED]
    lines = []
    for file in files:
        with file.open("rb") as opened:
            lines.append(f"{file.relative_to(root).as_posix()} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _class_of(source: str | Path, part: str, index: Mapping[str, Any]) -> Any:
    library, name = index.get(part) or (None, None)
    if library not in ("diffusers", "transformers") or name is None:
        raise ModelError(f"{source}: its {part} is {library}.{name}: use a class of diffusers or transformers")
    if name != _CLASSES.get(part, name):
        raise ModelError(f"{source}: its {part} is a {name}: use a model with a {_CLASSES[part]}")
    return getattr(importlib.import_module(library), name)


def _load_config(source: str | Path, part: str, index: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_class_of(source, part, index).load_config(str(source), subfolder=part))


def _load_part(source: str | Path, part: str, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import DDIMScheduler

    if part == "scheduler":
        config = dict(DDIMScheduler.load_config(str(source), subfolder=part))
        if "beta_start" not in config and config.get("trained_betas") is None:
            raise ModelError(
                f"{source}: its scheduler, a {config.get('_class_name')}, states no beta_start (flow matching or EDM?):"
                " use a model trained on a DDPM noise schedule"
            )
        # schedulers without this field never clip; DDIM's own default would clamp unbounded latents
        config.setdefault("clip_sample", False)
        return DDIMScheduler.from_config(config)
    made_of = _class_of(source, part, index)
    if part.startswith("tokenizer"):
        return made_of.from_pretrained(str(source), subfolder=part)
    dtype_name = "dtype" if made_of.__module__.startswith("transformers") else "torch_dtype"
    return made_of.from_pretrained(str(source), subfolder=part, use_safetensors=True, **{dtype_name: dtype})


def _check_unet(source: str | Path, kind: Kind, config: Mapping[str, Any]) -> None:
    expected = {"addition_embed_type": kind.addition_embed_type}
    for option in ("time_cond_proj_dim", "addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if config.get(option) != expected.get(option):
            hint = " (distilled guidance)" if option == "time_cond_proj_dim" else ""
            raise ModelError(
                f"{source}: its unet has {option}={config.get(option)!r}{hint}, {kind.name} models have"
                f" {expected.get(option)!r}: use a plain {kind.name} model"
            )


def _check_parts(source: str | Path, kind: Kind, parts: Mapping[str, Any]) -> None:
    unet, vae = parts["unet"], parts["vae"]
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"{source}: its unet takes {unet.config.in_channels} channels, its vae makes {vae.config.latent_channels}"
            " (inpainting?): use a text-to-image model"
        )
    if kind.size_ids:
        pooled = parts["text_encoder_2"].config.projection_dim
        given = kind.size_ids * unet.config.addition_time_embed_dim + pooled
        if unet.add_embedding.linear_1.in_features != given:
            raise ModelError(
                f"{source}: its unet takes {unet.add_embedding.linear_1.in_features} added features, {kind.size_ids}"
                f" sizes and the pooled text give {given} (a refiner?): use an SDXL base model"
            )


def _check_schedule(source: str | Path, config: Any) -> None:
    if config.prediction_type not in PREDICTION_TYPES:
        raise ModelError(
            f"{source}: prediction_type is {config.prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}"
        )
    if config.thresholding:
        raise ModelError(f"{source}: its scheduler uses thresholding, which is unfit for latents: turn it off")
    if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
        raise ModelError(f"{source}: rescale_betas_zero_snr leaves nothing to divide by with epsilon: use v_prediction")
