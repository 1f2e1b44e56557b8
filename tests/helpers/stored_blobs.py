"""What lies in a registry's store, by its blobs' hashes; orphans, as uploads leave them that were cut short."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from infra.blobs import put_blob
from infra.storage import Store


def orphan(store: Store, data: bytes) -> str:
    """Store a blob that no manifest names; returns its hash."""
    digest = sha256(data).hexdigest()
    put_blob(store, digest, data)
    return digest


def orphan_files(store: Store, directory: Path) -> None:
    for file in directory.iterdir():
        orphan(store, file.read_bytes())


def blobs(store: Store) -> set[str]:
    """Hashes of all blobs that are there."""
    return {path.rsplit("/", 1)[-1] for path in store.list("blobs")}


def needed(store: Store) -> set[str]:
    """Hashes that the manifests name which can be seen."""
    manifests = (path for path in store.list("adapters") if "/versions/" in path)
    return {digest for path in manifests for digest in _named(store.read(path))}


@lru_cache
def _named(manifest: bytes) -> frozenset[str]:
    return frozenset(file["sha256"] for file in json.loads(manifest)["files"])
