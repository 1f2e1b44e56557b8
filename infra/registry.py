"""The registry: adapters, bundles and aliases in an object store.

    blobs/sha256/HEX                      bytes, named by their hash
    adapters/NAME/versions/000007.json    manifests, create-only
    bundles/NAME/versions/000003.json
    {adapters,bundles}/NAME/contents/     which version a content is to be: see infra.versions
    {adapters,bundles}/NAME/aliases/      see infra.aliases
    gc/                                   see infra.intents

Blobs first, one create-only manifest last: readers follow manifests only, so an upload that was cut short does not
exist. Every blob is hashed again whenever it is read.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from pydantic import ValidationError

from infra.aliases import Alias
from infra.artifact_files import adapter_files
from infra.blobs import blob_path, cached_adapter, fetch_adapter, put_blob
from infra.cards import adapter_card
from infra.errors import IntegrityError, ObjectMissingError, ReadOnlyError, RegistryError, UnknownRecordError
from infra.intents import StillHeld, held
from infra.manifests import (
    CARD_FILE,
    SCHEMA_VERSION,
    AdapterFacts,
    AdapterLink,
    AdapterRecord,
    AliasEntry,
    BaseIdentity,
    BundleFacts,
    BundleRecord,
    FileEntry,
    Kind,
    Record,
    check_name,
    content_sha256,
    seal,
)
from infra.storage import Store
from infra.versions import VersionLog

LATEST = "latest"
KINDS: tuple[Kind, ...] = ("adapter", "bundle")
R = TypeVar("R", AdapterRecord, BundleRecord)


class Registry:
    """The face of one store. Every method may also raise the StoreErrors of infra.errors."""

    def __init__(self, store: Store, *, read_only: bool = False) -> None:
        self.store = store
        self.read_only = read_only

    def publish_adapter(self, name: str, directory: str | Path, facts: AdapterFacts) -> AdapterRecord:
        """Commit a directory of LoRA weights and the files beside them as the next version of `name`.

        The same files and facts again return the version that holds them. A directory without a model card gets one
        made from the facts. Raises RegistryError, UnsafeFileError.
        """
        self._writable("publish")
        check_name(name)
        directory = Path(directory)
        files = adapter_files(directory)
        card = adapter_card(name, facts).encode()
        if not any(file.path == CARD_FILE for file in files):
            card_file = FileEntry(path=CARD_FILE, size=len(card), sha256=hashlib.sha256(card).hexdigest())
            files = sorted([*files, card_file], key=lambda file: file.path)
        fields = facts.model_dump(mode="json") | {"kind": "adapter", "files": [file.model_dump() for file in files]}

        def work(still_held: StillHeld) -> AdapterRecord:
            def upload(*, again: bool) -> None:
                for file in files:
                    path = directory / file.path
                    if not again or self.store.head(blob_path(file.sha256)) is None:
                        put_blob(self.store, file.sha256, path.read_bytes() if path.exists() else card)
                still_held()

            return self._commit(self._log("adapter", name), fields, upload)

        return held(self.store, (file.sha256 for file in files), work)

    def publish_bundle(
        self,
        name: str,
        base: BaseIdentity,
        adapters: Mapping[str, AdapterRecord],
        **facts: Any,
    ) -> BundleRecord:
        """Commit a bundle: basis name -> published adapter, over one base. `facts`: other fields of BundleFacts.

        Raises RegistryError when an adapter is not in this registry, or was trained on another base.
        """
        self._writable("publish")
        check_name(name)
        for basis, adapter in adapters.items():
            check_name(basis, "basis name")
            if adapter.base.sha256 != base.sha256:
                raise RegistryError(
                    f"adapter {adapter.ref} ({basis}) was trained on base {adapter.base.source!r} with hash "
                    f"{adapter.base.sha256[:12]}, the bundle's base {base.source!r} has {base.sha256[:12]}: blend only "
                    "adapters of one base"
                )
            if self.get_adapter(adapter.ref).digest != adapter.digest:
                raise RegistryError(
                    f"adapter {adapter.ref} in {self.store.url} is another one than was given: publish it here first"
                )
        links = {
            basis: AdapterLink(name=adapter.name, version=adapter.version, digest=adapter.digest)
            for basis, adapter in adapters.items()
        }
        try:
            bundle = BundleFacts(base=base, adapters=links, **facts)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "bundle"
            raise RegistryError(f"bundle {name}: {field}: {problem['msg']}") from None
        fields = bundle.model_dump(mode="json") | {"kind": "bundle"}
        return self._commit(self._log("bundle", name), fields)

    def get_adapter(self, ref: str) -> AdapterRecord:
        """ "name@7", "name@alias", or "name" for the newest. Raises UnknownRecordError."""
        return self.get(ref, "adapter")

    def get_bundle(self, ref: str) -> BundleRecord:
        """ "name@7", "name@champion", or "name" for the newest. Raises UnknownRecordError."""
        return self.get(ref, "bundle")

    @overload
    def get(self, ref: str, kind: Literal["bundle"] = "bundle") -> BundleRecord: ...
    @overload
    def get(self, ref: str, kind: Literal["adapter"]) -> AdapterRecord: ...
    @overload
    def get(self, ref: str, kind: Kind) -> Record: ...
    def get(self, ref: str, kind: Kind = "bundle") -> Record:
        """The record that a reference names. Raises UnknownRecordError, IntegrityError, SchemaError."""
        name, at, selector = ref.partition("@")
        check_name(name, f"{kind} name")
        log = self._log(kind, name)
        if not at or selector == LATEST:
            return self._version(kind, name, log.latest())
        if selector.isascii() and selector.isdigit():
            return self._version(kind, name, int(selector))
        entry = Alias(self.store, log.folder, selector).read()
        if entry is None:
            self._version(kind, name, log.latest())
            known = ", ".join(self.aliases(name, kind)) or "none"
            raise UnknownRecordError(
                f"{kind} {name!r} has no alias {selector!r} in {self.store.url}; it has: {known}. Promote a version "
                "to it, or name a version as in name@7"
            )
        record = self._version(kind, name, entry.version)
        if record.digest != entry.digest:
            raise IntegrityError(
                f"{kind} {record.ref} is not the one that alias {selector!r} was moved to: restore "
                f"{self.store.url}/{log.path(entry.version)} from a copy"
            )
        return record

    def adapters_of(self, bundle: BundleRecord) -> dict[str, AdapterRecord]:
        """The bundle's adapters by basis name. Raises IntegrityError for one that is not the one it names."""
        records = {}
        for basis, link in bundle.adapters.items():
            record = self.get_adapter(link.ref)
            if record.digest != link.digest:
                raise IntegrityError(f"adapter {link.ref} is not the one that bundle {bundle.ref} names: restore it")
            records[basis] = record
        return records

    def names(self, kind: Kind = "bundle") -> list[str]:
        """Names with at least one version."""
        return [name for name in self.store.folders(f"{kind}s") if self._log(kind, name).latest()]

    def versions(self, name: str, kind: Kind = "bundle") -> list[Record]:
        """All versions of a name, oldest first."""
        log = self._log(kind, check_name(name, f"{kind} name"))
        return [log.read(version) for version in range(1, log.latest() + 1)] or [self._version(kind, name, 0)]

    def alias_names(self, name: str, kind: Kind = "bundle") -> list[str]:
        """Aliases of a name, sorted."""
        paths = self.store.list(f"{kind}s/{check_name(name)}/aliases")
        return [path.rsplit("/", 1)[-1].removesuffix(".json") for path in paths if path.count("/") == 3]

    def aliases(self, name: str, kind: Kind = "bundle") -> dict[str, AliasEntry]:
        """Where each alias of a name points."""
        folder = f"{kind}s/{check_name(name)}"
        entries = {alias: Alias(self.store, folder, alias).read() for alias in self.alias_names(name, kind)}
        return {alias: entry for alias, entry in entries.items() if entry}

    def fetch(self, record: AdapterRecord, directory: str | Path) -> Path:
        """Write the adapter's files to a new or empty directory, all or none, each hashed again.

        Raises IntegrityError naming the file, RegistryError when the directory holds something.
        """
        return fetch_adapter(self.store, record, Path(directory))

    def cached(self, record: AdapterRecord, cache_dir: Path) -> Path:
        """Directory with the adapter's files in a local cache, hashed again; downloaded when not there."""
        return cached_adapter(self.store, record, cache_dir)

    def promote(
        self,
        name: str,
        version: int,
        alias: str = "champion",
        *,
        actor: str,
        reason: str,
        kind: Kind = "bundle",
        expected_seq: int | None = None,
    ) -> AliasEntry:
        """Point an alias at a version. Raises AliasMovedError when someone else moved it meanwhile."""
        self._writable("promote")
        check_name(name, f"{kind} name")
        target = Alias(self.store, f"{kind}s/{name}", alias)
        record = self._version(kind, name, version)
        return target.move(record, actor=actor, reason=reason, expected_seq=expected_seq)

    def rollback(
        self, name: str, alias: str = "champion", *, actor: str, reason: str, kind: Kind = "bundle"
    ) -> AliasEntry:
        """Point an alias back at the version before; again, at the one before that."""
        self._writable("roll back")
        check_name(name, f"{kind} name")
        target = Alias(self.store, f"{kind}s/{name}", alias)
        current, earlier = target.previous()
        record = self._version(kind, name, earlier.version)
        return target.move(record, actor=actor, reason=reason, expected_seq=current.seq, restores=earlier.seq)

    def history(self, name: str, alias: str = "champion", kind: Kind = "bundle") -> list[AliasEntry]:
        """Every move of an alias, oldest first."""
        return Alias(self.store, f"{kind}s/{check_name(name)}", alias).history()

    def check_writable(self) -> None:
        """Raise unless this registry can be published to: call it before hours of work that end in a publish."""
        self._writable("publish")
        self.store.probe()

    def _commit(self, log: VersionLog[R], fields: dict[str, Any], upload: Callable[..., None] = lambda **_: None) -> R:
        """The version that holds these fields: an old one, or a new one, its blobs uploaded before its manifest.

        `upload(again=True)` brings back blobs that an old version has lost.
        """
        content = content_sha256(fields)
        published = log.find(content)
        upload(again=published is not None)
        if published is not None:
            return published
        commit = {
            "schema_version": SCHEMA_VERSION,
            "name": log.name,
            "content_sha256": content,
            "nonce": secrets.token_hex(16),
            "created_at": datetime.now(UTC).isoformat(),
        }
        return log.commit(content, lambda version: seal(fields | commit | {"version": version}))

    @overload
    def _log(self, kind: Literal["adapter"], name: str) -> VersionLog[AdapterRecord]: ...
    @overload
    def _log(self, kind: Literal["bundle"], name: str) -> VersionLog[BundleRecord]: ...
    @overload
    def _log(self, kind: Kind, name: str) -> VersionLog[AdapterRecord] | VersionLog[BundleRecord]: ...
    def _log(self, kind: Kind, name: str) -> VersionLog[AdapterRecord] | VersionLog[BundleRecord]:
        if kind == "adapter":
            return VersionLog(self.store, AdapterRecord, f"adapters/{name}")
        return VersionLog(self.store, BundleRecord, f"bundles/{name}")

    def _version(self, kind: Kind, name: str, version: int) -> Record:
        """A version that must exist. Version 0, that of an empty log, never does."""
        log = self._log(kind, name)
        try:
            return log.read(version)
        except ObjectMissingError:
            latest = log.latest()
        if latest:
            raise UnknownRecordError(
                f"{kind} {name!r} has no version {version} in {self.store.url}: versions are 1 to {latest}"
            )
        known = ", ".join(self.names(kind)) or "none yet"
        raise UnknownRecordError(
            f"no {kind} {name!r} in {self.store.url}; there are: {known}. Publish it, or check "
            "DIFFUSION_BLEND_STORE_URL"
        )

    def _writable(self, what: str) -> None:
        if self.read_only:
            raise ReadOnlyError(f"cannot {what} in {self.store.url}: it is read-only. Use a store of your own")
