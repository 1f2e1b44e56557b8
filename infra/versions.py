"""The version log of one name: manifests 000001.json, 000002.json, ... each create-only, without a gap.

Exactly-once without a server: before a manifest is written, an intent `contents/<content hash>.json` says in
which slot. A manifest is created only in the slot that its content's intent names, and an intent moves on only
when that slot is known to hold other content. So each content gets at most one version, however many publishers
race and whenever they die, and asking whether a content is published takes two reads instead of a scan.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from infra.cache import Cache
from infra.errors import ConflictError, IntegrityError, ObjectExistsError, ObjectMissingError, StoreError
from infra.manifests import Commit, seal, unseal
from infra.storage import Listed, Store

R = TypeVar("R", bound=Commit)
MAX_RACES = 1_000
CHECKSUM = "checksum"


class VersionLog(Generic[R]):
    """Versions of one adapter or bundle: `folder` is "adapters/NAME" or "bundles/NAME", NAME validated."""

    def __init__(self, store: Store, model: type[R], folder: str, cache: Cache | None = None) -> None:
        self.store = store
        self.cache = cache
        self.model = model
        self.folder = folder
        self.name = folder.split("/")[-1]

    def path(self, version: int) -> str:
        return f"{self.folder}/versions/{version:06d}.json"

    def read(self, version: int, digest: str = "") -> R:
        """A committed version; the store is not asked for the one with this digest where a cache has it.

        Raises ObjectMissingError; IntegrityError or SchemaError as `unseal` does.
        """
        where = self.path(version)
        cached = self.cache.read_manifest(digest) if self.cache and digest else None
        raw = self.store.read(where) if cached is None else cached
        record = unseal(self.model, raw, f"{self.store.url}/{where}")
        if self.cache and cached is None:
            self.cache.keep_manifest(record.digest, raw)
        if (record.name, record.version) != (self.name, version):
            raise IntegrityError(f"{self.store.url}/{where} holds the manifest of {record.ref}: restore it from a copy")
        return record

    def exists(self, version: int) -> bool:
        return self.store.head(self.path(version)) is not None

    def listed(self) -> dict[int, Listed]:
        """Every version there is with its size and age, from one listing and without reading any."""
        found = {}
        for entry in self.store.listing(f"{self.folder}/versions"):
            number = entry.path.rpartition("/")[2].removesuffix(".json")
            if number.isascii() and number.isdigit() and entry.path == self.path(int(number)):
                found[int(number)] = entry
        return found

    def read_all(self) -> list[R]:
        """Every version, oldest first."""
        versions = range(1, self.latest() + 1)
        if self.store.parallel == 1:
            return [self.read(version) for version in versions]
        with ThreadPoolExecutor(self.store.parallel) as pool:
            return list(pool.map(self.read, versions))

    def latest(self) -> int:
        """Highest version, 0 for none: found by bisection, as there are no gaps. Needs no listing."""
        above = 1
        while self.exists(above):
            above *= 2
        below = above // 2
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if self.exists(middle) else (below, middle)
        return below

    def find(self, content: str) -> R | None:
        """The version that holds this content, if it was ever committed."""
        try:
            return self._committed(self.intended(self._intent(content)), content)
        except ObjectMissingError:
            return None

    def commit(self, content: str, write: Callable[[int], bytes]) -> R:
        """Write the manifest `write(version)` in the next free slot, unless the content has a version already.

        Returns the version that holds the content. Raises StoreError when none could be committed.
        """
        for _ in range(MAX_RACES):
            slot = self._claim(content)
            with suppress(ObjectExistsError):
                self.store.create(self.path(slot), write(slot))
            committed = self._committed(slot, content)
            if committed is not None:
                return committed
        raise StoreError(f"{self.store.url}/{self.folder} is written to without pause: publish again later")

    def _claim(self, content: str) -> int:
        """The slot to write this content in: that of its intent, moved on where others took it."""
        path = self._intent(content)
        try:
            raw, etag = self.store.read_tagged(path)
        except ObjectMissingError:
            slot = self.latest() + 1
            try:
                self.store.create(path, _intent_bytes(slot))
            except ObjectExistsError:
                return self.intended(path)
            return slot
        slot = self.intended(path, raw)
        if not self.exists(slot):
            if slot > 1 and not self.exists(slot - 1):
                raise self._damaged(path, f", or version {slot - 1} is missing")
            return slot
        if self._committed(slot, content) is not None:
            return slot
        moved = self.latest() + 1
        try:
            self.store.replace(path, _intent_bytes(moved), etag)
        except ConflictError:
            return self.intended(path)
        return moved

    def _committed(self, slot: int, content: str) -> R | None:
        try:
            record = self.read(slot)
        except ObjectMissingError:
            return None
        return record if record.content_sha256 == content else None

    def _intent(self, content: str) -> str:
        return f"{self.folder}/contents/{content}.json"

    def intended(self, path: str, raw: bytes | None = None) -> int:
        """The slot that the intent at this path names. Raises ObjectMissingError, IntegrityError."""
        raw = self.store.read(path) if raw is None else raw
        try:
            fields = json.loads(raw)
            slot = fields["version"]
            # Earlier software wrote no checksum.
            whole = set(fields) == {"version"} or raw == seal(fields, CHECKSUM)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged(path) from None
        if not whole or not isinstance(slot, int) or slot < 1:
            raise self._damaged(path)
        return slot

    def _damaged(self, path: str, otherwise: str = "") -> IntegrityError:
        return IntegrityError(
            f"{self.store.url}/{path} is damaged{otherwise}: restore it from a copy of the store, or delete it; then "
            "the same content would get another version when it is published again"
        )


def _intent_bytes(slot: int) -> bytes:
    return seal({"version": slot}, CHECKSUM)
