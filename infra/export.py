"""Writes a record out of the registry, as files that other software reads."""

import os
import secrets
import shutil
from pathlib import Path

from infra.errors import RegistryError
from infra.manifests import AdapterRecord, Record
from infra.registry import Registry

MANIFEST_FILE = "manifest.json"


def export(registry: Registry, record: Record, directory: Path) -> Path:
    """An adapter becomes a diffusers LoRA directory; a bundle, one such directory per basis name. All or nothing.

    The manifest is written beside them. Raises RegistryError when the directory holds something already.
    """
    check_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}-{secrets.token_hex(8)}"
    try:
        if isinstance(record, AdapterRecord):
            registry.fetch(record, staging)
        else:
            for basis, adapter in registry.adapters_of(record).items():
                registry.fetch(adapter, staging / basis)
        (staging / MANIFEST_FILE).write_text(record.model_dump_json(indent=2) + "\n")
        os.rename(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def check_new(directory: Path) -> None:
    """Raise RegistryError unless the directory is new, or empty."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise RegistryError(f"{directory} is not an empty directory: name a new one")
