"""From a reference such as `sprites@champion` to files on this machine, and from those to a blend engine."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from infra.cache import Cache
from infra.errors import InfraError, UnknownRecordError
from infra.local_store import LocalStore
from infra.manifests import AdapterRecord, BundleDefaults, BundleRecord, Kind, Record
from infra.registry import Registry
from infra.settings import Settings, read_settings
from infra.storage import open_store

if TYPE_CHECKING:
    from blend.engine import BlendEngine

DEFAULT_BUNDLE = "sprites@champion"
Progress = Callable[[int, int], None]


class BundleError(InfraError, ValueError):
    """A bundle or base model that cannot be used on this machine. Survives pickle."""


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle whose files are all here: checked, and ready for `load_engine`."""

    record: BundleRecord
    base_path: Path
    adapters: dict[str, Path]  # basis name -> directory with pytorch_lora_weights.safetensors
    adapter_records: dict[str, AdapterRecord] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        return self.record.ref

    @property
    def defaults(self) -> BundleDefaults:
        return self.record.defaults


def open_bundle(
    ref: str = DEFAULT_BUNDLE,
    settings: Settings | None = None,
    *,
    base: str | None = None,
    on_bytes: Progress | None = None,
) -> LoadedBundle:
    """Find a bundle, fetch its adapters into the cache and check its base model.

    A name is looked up in the user's store, and only if it does not exist there, among the bundles that come with
    the package. `base`: where the base model lies on this machine, when not where it lay for the publisher.
    A store that cannot be reached is done without where the cache has all that is needed.
    `on_bytes` is told how many more bytes have come, and how many there are in all, from any thread.
    Raises BundleError, RegistryError, StoreError.
    """
    settings = settings or read_settings()
    registry, record = find_record(ref, settings)
    base_path = verify_base(record, base)
    records = registry.adapters_of(record)
    if on_bytes is not None:
        total = sum({file.sha256: file.size for adapter in records.values() for file in adapter.files}.values())
        registry.store.on_bytes = lambda more: on_bytes(more, total)
    paths = local_cache(settings).adapters(registry.store, list(records.values()))
    return LoadedBundle(record, base_path, dict(zip(records, paths, strict=True)), records)


def local_cache(settings: Settings) -> Cache:
    return Cache(settings.cache_dir, int(settings.cache_gb * 1e9))


@overload
def find_record(ref: str, settings: Settings, kind: Literal["bundle"] = "bundle") -> tuple[Registry, BundleRecord]: ...
@overload
def find_record(ref: str, settings: Settings, kind: Kind) -> tuple[Registry, Record]: ...
def find_record(ref: str, settings: Settings, kind: Kind = "bundle") -> tuple[Registry, Record]:
    """A record and the registry that holds it. Raises UnknownRecordError naming both places it was sought in."""
    store = open_store(settings.store_url, settings)
    # A directory is as near as the cache is.
    cache = None if isinstance(store, LocalStore) else local_cache(settings)
    own = Registry(store, cache=cache)
    try:
        if cache is None:
            return own, own.get(ref, kind)
        model: type[Record] = AdapterRecord if kind == "adapter" else BundleRecord
        return own, cache.last_known(f"{kind} {ref} of {store.url}", model, lambda: own.get(ref, kind))
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

    Raises BundleError.
    """
    from blend.bundle import find_base
    from blend.model import ModelError

    try:
        return str(find_base(source))
    except ModelError as error:
        raise BundleError(str(error)) from error


def verify_base(record: BundleRecord, base: str | None = None) -> Path:
    """The base model's directory, after its hash was compared with the bundle's. Raises BundleError."""
    from blend.bundle import check_base
    from blend.model import ModelError

    try:
        return check_base(base or record.base.source, record.base.sha256, f"bundle {record.ref}")
    except ModelError as error:
        raise BundleError(str(error)) from error


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
