"""A bundle as files on this machine: a base model, its adapters by basis name, and how it is meant to be sampled.

Reads the directories that `diffusion-blend registry export` writes. Knows nothing of the registry itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, Field, ValidationError

from blend.model_files import ModelError, model_hash

MANIFEST_FILE = "manifest.json"
SPRITES = "sprites"
_SCHEMA_VERSION = 1
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


class ManifestError(ValueError):
    """A directory that is no exported bundle, or one whose manifest cannot be read."""


class OpenBundle(Protocol):
    """A bundle that someone else opened, such as workers.bundles.LoadedBundle.

    It may have `defaults` too, an object with some of the fields of `Defaults`.
    """

    @property
    def base_path(self) -> str | Path: ...

    @property
    def adapters(self) -> Mapping[str, str | Path]: ...


class Defaults(BaseModel, frozen=True, from_attributes=True):
    """How images are made unless a call says otherwise; without a bundle's advice, as diffusers does."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    method: str = "mpa"
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a pipeline is loaded from."""

    base_path: Path
    base_sha256: str  # blend.model.model_hash of it
    adapters: dict[str, Path]
    defaults: Defaults


class _Base(BaseModel):
    source: str
    sha256: str


class _Manifest(BaseModel):
    name: str
    version: int
    base: _Base
    adapters: dict[str, Any] = Field(min_length=1)
    defaults: Defaults = Defaults()


def read_bundle(bundle: str | Path | OpenBundle, base: str | Path | None = None) -> Bundle:
    """Find a bundle's files; `base` says where its base model lies, when not where the bundle says.

    Raises ManifestError, and ModelError for a base that is missing or not the one the adapters were trained on.
    """
    if isinstance(bundle, str | os.PathLike):
        return _read_directory(Path(bundle), base)
    defaults = Defaults.model_validate(getattr(bundle, "defaults", None) or Defaults())
    adapters = {name: Path(path) for name, path in bundle.adapters.items()}
    own = model_hash(bundle.base_path)
    path = Path(bundle.base_path) if base is None else check_base(base, own, "the bundle")
    return Bundle(path, own, adapters, defaults)


def find_base(source: str | os.PathLike[str]) -> Path:
    """Return the directory of a base model: "sprites", a diffusers directory, or a Hub id, which is downloaded.

    The one place that knows the name "sprites". Raises ModelError.
    """
    name = os.fspath(source)
    if name == SPRITES:
        from blend.sprites import base_model_path

        return base_model_path()
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        if not (directory / "model_index.json").is_file():
            raise ModelError(f"base model {name!r} has no model_index.json: name a diffusers pipeline directory")
        return directory.absolute()
    if directory.is_absolute() or not re.fullmatch(_HUB_ID, name):
        raise ModelError(
            f"base model {name!r} does not exist: name a diffusers directory, a Hub id (owner/name), or {SPRITES!r}"
        )
    return _download(name)


def check_base(source: str | os.PathLike[str], sha256: str, whose: str) -> Path:
    """Return the base's directory; ModelError unless its hash is the one that `whose` adapters were trained on."""
    path = find_base(source)
    found = model_hash(path)
    if found != sha256:
        raise ModelError(
            f"base model {os.fspath(source)!r} at {path} has hash {found[:12]}, {whose} was made with"
            f" {sha256[:12]}: name the base that its adapters were trained on"
        )
    return path


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"base model {hub_id!r} cannot be downloaded: {first_line}. Check the id and the network, or name a "
            "local diffusers directory"
        ) from error


def _read_directory(directory: Path, base: str | Path | None) -> Bundle:
    manifest = _read_manifest(directory)
    ref = f"bundle {manifest.name}@{manifest.version}"
    adapters = {name: directory / name for name in manifest.adapters}
    for name, path in adapters.items():
        if not path.is_dir():
            raise ManifestError(f"{directory} lacks adapter {name!r} of {ref}: export the bundle again")
    try:
        path = check_base(base or manifest.base.source, manifest.base.sha256, ref)
    except ModelError as error:
        if base is not None:
            raise
        raise ModelError(f"{error}; base= says where it lies on this machine") from error
    return Bundle(path, manifest.base.sha256, adapters, manifest.defaults)


def _read_manifest(directory: Path) -> _Manifest:
    file = directory / MANIFEST_FILE
    if not file.is_file():
        raise ManifestError(
            f"{str(directory)!r} is no exported bundle, it holds no {MANIFEST_FILE}: write one with"
            " `diffusion-blend registry export NAME@ALIAS DIR`, or give what workers.bundles.open_bundle returns"
        )
    try:
        fields = json.loads(file.read_bytes())
        kind, schema = fields["kind"], int(fields["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{file} is no manifest ({error!r}): export the bundle again") from error
    if kind != "bundle":
        raise ManifestError(f"{directory} holds an {kind}, not a bundle: use from_pretrained(base, adapters={{...}})")
    if schema > _SCHEMA_VERSION:
        raise ManifestError(
            f"{file} has schema version {schema}, this software reads up to {_SCHEMA_VERSION}: upgrade diffusion-blend"
        )
    try:
        return _Manifest.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ManifestError(f"{file}: {where}: {problem['msg']}. Export the bundle again") from error
