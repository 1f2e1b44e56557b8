"""From a reference such as `sprites@champion` to files on this machine, and from those to a blend engine."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from infra.errors import InfraError, UnknownRecordError
from infra.manifests import BundleRecord, Kind, Record
from infra.registry import Registry
from infra.settings import Settings, read_settings
from infra.storage import open_store

if TYPE_CHECKING:
    from blend.engine import BlendEngine

DEFAULT_BUNDLE = "sprites@champion"
SPRITES = "sprites"
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


class BundleError(InfraError, ValueError):
    """A bundle or base model that cannot be used on this machine. Survives pickle."""


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle whose files are all here: checked, and ready for `load_engine`."""

    record: BundleRecord
    base_path: Path
    adapters: dict[str, Path]  # basis name -> directory with pytorch_lora_weights.safetensors

    @property
    def ref(self) -> str:
        return self.record.ref


def open_bundle(
    ref: str = DEFAULT_BUNDLE, settings: Settings | None = None, *, base: str | None = None
) -> LoadedBundle:
    """Find a bundle, fetch its adapters into the cache and check its base model.

    A name is looked up in the user's store, and only if it does not exist there, among the bundles that come with
    the package. `base`: where the base model lies on this machine, when not where it lay for the publisher.
    Raises BundleError, RegistryError, StoreError.
    """
    settings = settings or read_settings()
    registry, record = find_record(ref, settings)
    base_path = verify_base(record, base)
    adapters = {
        basis: registry.cached(adapter, settings.cache_dir) for basis, adapter in registry.adapters_of(record).items()
    }
    return LoadedBundle(record, base_path, adapters)


@overload
def find_record(ref: str, settings: Settings, kind: Literal["bundle"] = "bundle") -> tuple[Registry, BundleRecord]: ...
@overload
def find_record(ref: str, settings: Settings, kind: Kind) -> tuple[Registry, Record]: ...
def find_record(ref: str, settings: Settings, kind: Kind = "bundle") -> tuple[Registry, Record]:
    """A record and the registry that holds it. Raises UnknownRecordError naming both places it was sought in."""
    own = Registry(open_store(settings.store_url, settings))
    try:
        return own, own.get(ref, kind)
    except UnknownRecordError as error:
        missing = error
    shipped = shipped_registry()
    if shipped is None or ref.partition("@")[0] in own.names(kind):
        raise missing
    try:
        return shipped, shipped.get(ref, kind)
    except UnknownRecordError as error:
        raise UnknownRecordError(f"{missing}. Among those of the package: {error}") from None


def shipped_registry() -> Registry | None:
    """The registry tree inside the package, read-only; None where the package has none."""
    try:
        from blend.sprites import REGISTRY_PATH
    except ImportError:
        return None
    if not Path(REGISTRY_PATH).is_dir():
        return None
    return Registry(open_store(str(Path(REGISTRY_PATH).absolute())), read_only=True)


def resolve_base(source: str | os.PathLike[str]) -> str:
    """Local directory of a base model: "sprites", a diffusers directory, or a Hub id, which is downloaded.

    The one place that knows the name "sprites". Raises BundleError.
    """
    name = os.fspath(source)
    if name == SPRITES:
        from blend.sprites import base_model_path

        return str(base_model_path())
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        if not (directory / "model_index.json").is_file():
            raise BundleError(f"base model {name!r} has no model_index.json: name a diffusers pipeline directory")
        return str(directory.absolute())
    if directory.is_absolute() or not re.fullmatch(_HUB_ID, name):
        raise BundleError(
            f"base model {name!r} does not exist: name a diffusers directory, a Hub id (owner/name), or {SPRITES!r}"
        )
    return _download(name)


def _download(hub_id: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"base model {hub_id!r} cannot be downloaded: {first_line}. Check the id and the network, or name a "
            "local diffusers directory"
        ) from error


def verify_base(record: BundleRecord, base: str | None = None) -> Path:
    """The base model's directory, after its hash was compared with the bundle's. Raises BundleError."""
    from blend.model import model_hash

    source = base or record.base.source
    path = resolve_base(source)
    found = model_hash(path)
    if found != record.base.sha256:
        raise BundleError(
            f"base model {source!r} at {path} has hash {found[:12]}, bundle {record.ref} was made with "
            f"{record.base.sha256[:12]}: name the base that its adapters were trained on"
        )
    return Path(path)


def load_engine(bundle: LoadedBundle, device: str = "cpu", **engine_options: Any) -> "BlendEngine":
    """An engine with the bundle's base and adapters. Raises blend.adapters.AdapterError where they do not fit."""
    from blend.adapters import AdapterBank
    from blend.engine import BlendEngine
    from blend.model import load_model

    model = load_model(bundle.base_path, device=device)
    bank = AdapterBank(model.unet)
    for basis, directory in bundle.adapters.items():
        bank.load(basis, directory)
    return BlendEngine(model, bank, **engine_options)
