"""Examines a registry: does its store keep its promises, and is everything in it whole?"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from infra.aliases import Alias
from infra.blobs import blob_path
from infra.errors import InfraError, ObjectMissingError
from infra.manifests import AdapterRecord, BundleRecord, Kind, Record
from infra.registry import KINDS, Registry
from infra.versions import VersionLog


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong: where, and what to do about it."""

    where: str
    problem: str


def examine(registry: Registry, on_progress: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Probe the store, then read every manifest, alias and blob. `on_progress` is told what is being looked at.

    Raises StoreError when the store cannot be read at all.
    """
    findings = []
    if not registry.read_only:
        on_progress("conditional writes")
        try:
            registry.store.probe()
        except InfraError as error:
            findings.append(Finding(registry.store.url, str(error)))
    sound: set[str] = set()
    for kind in KINDS:
        for name in registry.store.folders(f"{kind}s"):
            on_progress(f"{kind} {name}")
            findings += _versions(registry, kind, name, sound)
            findings += _contents(registry, kind, name)
            findings += _aliases(registry, kind, name)
    return findings


def _versions(registry: Registry, kind: Kind, name: str, sound: set[str]) -> Iterator[Finding]:
    folder = f"{kind}s/{name}/versions"
    numbers = sorted(VersionLog(registry.store, AdapterRecord, f"{kind}s/{name}").listed())
    gaps = sorted(set(range(1, (numbers or [0])[-1])) - set(numbers))
    if gaps:
        yield Finding(f"{registry.store.url}/{folder}", f"versions {gaps} are missing: restore them from a copy")
    for number in numbers:
        ref = f"{kind} {name}@{number}"
        try:
            record: Record = registry.get(f"{name}@{number}", kind)
            if isinstance(record, BundleRecord):
                registry.adapters_of(record)
        except InfraError as error:
            yield Finding(ref, str(error))
            continue
        if isinstance(record, AdapterRecord):
            yield from _blobs(registry, record, sound)


def _contents(registry: Registry, kind: Kind, name: str) -> Iterator[Finding]:
    """Damaged notes of which version holds which content: the next publish of that content would be refused."""
    log = VersionLog(registry.store, AdapterRecord if kind == "adapter" else BundleRecord, f"{kind}s/{name}")
    for path in registry.store.list(f"{log.folder}/contents"):
        try:
            log.intended(path)
        except ObjectMissingError:
            continue
        except InfraError as error:
            yield Finding(f"{registry.store.url}/{path}", str(error))


def _blobs(registry: Registry, record: AdapterRecord, sound: set[str]) -> Iterator[Finding]:
    """Blobs are shared: `sound` holds the hashes that were found whole already."""
    for file in record.files:
        if file.sha256 in sound:
            continue
        where = f"{file.path} of adapter {record.ref}"
        try:
            data = registry.store.read(blob_path(file.sha256))
        except ObjectMissingError:
            yield Finding(where, f"{blob_path(file.sha256)} is lost: publish the adapter again")
            continue
        if hashlib.sha256(data).hexdigest() != file.sha256:
            yield Finding(where, f"{blob_path(file.sha256)} is damaged: delete it and publish the adapter again")
        else:
            sound.add(file.sha256)


def _aliases(registry: Registry, kind: Kind, name: str) -> Iterator[Finding]:
    for alias in registry.alias_names(name, kind):
        try:
            registry.get(f"{name}@{alias}", kind)
            Alias(registry.store, f"{kind}s/{name}", alias).history()
        except InfraError as error:
            yield Finding(f"{kind} {name}@{alias}", str(error))
