"""A local cache of what was downloaded, shared by all processes of this machine.

    blobs/HEX               bytes, named by their hash; .HEX while they come
    adapters/DIGEST/        an adapter's files: hard links to blobs, in a directory that loaders take
    manifests/DIGEST.json   manifests as they were read
    known/HEX               the digest that a reference had when its store was last asked

Everything but `known` is content-addressed and hashed again whenever it is used, so nothing in it can be out of date,
and all of it may be deleted at any time. Whoever fetches a blob holds the kernel's lock on it, and others wait for
that instead of fetching it too. Whoever uses an adapter holds a shared lock on its directory until the process ends:
of the rest, the least recently used goes when there is more than `max_bytes`.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from infra.artifact_files import check_content, matches
from infra.blobs import fetch_blob
from infra.errors import RegistryError, StoreUnreachableError
from infra.locks import lease, locked
from infra.manifests import AdapterRecord, Commit, FileEntry, seal, unseal
from infra.storage import Store

DEFAULT_BYTES = 20 << 30
PARALLEL = 8
MAX_ROUNDS = 10
# Blobs of no adapter yet: somebody is about to link them.
FRESH_S = 600.0

R = TypeVar("R", bound=Commit)
log = logging.getLogger(__name__)


class Cache:
    """One cache directory. Any number of processes and threads may use it at the same time."""

    def __init__(self, directory: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    def adapters(self, store: Store, records: Sequence[AdapterRecord]) -> list[Path]:
        """Directories with these adapters' files, whole; what is not here is downloaded, several files at a time.

        The store is not asked for anything that is here. Raises IntegrityError as `fetch_blob` does, StoreError,
        RegistryError when the cache does not keep what is written to it.
        """
        try:
            found = [self._here(record) for record in records]
            for _ in range(MAX_ROUNDS):
                missing = [record for record, path in zip(records, found, strict=True) if path is None]
                if not missing:
                    return [path for path in found if path]
                self._fetch(store, missing)
                for record in missing:
                    self._assemble(record)
                found = [path or self._here(record) for record, path in zip(records, found, strict=True)]
                self.trim()
        except OSError as error:
            raise self._unfit(f"{error.filename or self.directory}: {error.strerror}") from error
        raise self._unfit("what is written to it does not stay there")

    def read_manifest(self, digest: str) -> bytes | None:
        """The manifest with this digest, when it is here and whole."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            raw = self._manifest(digest).read_bytes()
            fields = json.loads(raw)
            if fields.get("digest") == digest and seal(fields) == raw:
                return raw
        return None

    def keep_manifest(self, digest: str, raw: bytes) -> None:
        if self.read_manifest(digest) is None:
            _write(self._manifest(digest), raw)

    def last_known(self, ref: str, model: type[R], ask: Callable[[], R]) -> R:
        """What `ask` says; while the store cannot be reached, what it said when it was last asked for `ref` here."""
        known = self.directory / "known" / hashlib.sha256(ref.encode()).hexdigest()
        try:
            record = ask()
        except StoreUnreachableError as error:
            raw = None
            with suppress(OSError, ValueError):
                raw = self.read_manifest(known.read_text().strip())
            if raw is None:
                raise
            record = unseal(model, raw, str(known))
            log.warning("%s; going on with %s, as %s was when it was last asked for", error, record.ref, ref)
            return record
        _write(known, record.digest.encode())
        return record

    def trim(self) -> None:
        """Remove the least recently used adapters until no more than `max_bytes` are left; those in use stay."""
        (self.directory / "adapters").mkdir(parents=True, exist_ok=True)
        with locked(self.directory / ".trim", os.O_RDWR | os.O_CREAT) as mine:
            if not mine:  # another process is at it
                return
            self._remove_leftovers()
            blobs = {facts.st_ino: (path, facts) for path, facts in _files(self.directory / "blobs")}
            folders = {path: list(_files(path)) for path in (self.directory / "adapters").iterdir()}
            files = [entry for entries in (blobs.values(), *folders.values()) for entry in entries]
            left = sum({facts.st_ino: facts.st_size for _, facts in files}.values())
            for folder in sorted(folders, key=_used_at):
                if left <= self.max_bytes:
                    return
                if not _remove(folder):
                    continue
                for _, facts in folders[folder]:
                    blob = blobs.get(facts.st_ino)
                    if blob is None or _unlink_last(blob[0]):
                        left -= facts.st_size
            if left > self.max_bytes:
                log.warning("cache %s: %d bytes in use, %d are set", self.directory, left, self.max_bytes)

    def _here(self, record: AdapterRecord) -> Path | None:
        """The adapter's directory if it is whole, from now on in use."""
        directory = self.directory / "adapters" / record.digest
        if not directory.is_dir() or not lease(directory):
            return None
        if not all(_matches(directory / file.path, file) for file in record.files):
            return None
        with suppress(PermissionError):
            os.utime(directory)
        return directory

    def _fetch(self, store: Store, records: Iterable[AdapterRecord]) -> None:
        """Have every file of these adapters among the blobs."""
        wanted = {file.sha256: (file, record) for record in records for file in record.files}
        (self.directory / "blobs").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda entry: self._fetch_blob(store, entry[0], f"adapter {entry[1].ref}"), wanted.values()))

    def _fetch_blob(self, store: Store, file: FileEntry, owner: str) -> None:
        target = self.directory / "blobs" / file.sha256
        partial = target.with_name(f".{file.sha256}")
        while not _matches(target, file):
            with locked(partial, os.O_RDWR | os.O_CREAT, wait=True) as mine:
                if not mine:  # it was finished, or given up, by whom we waited for
                    continue
                if _matches(target, file):
                    partial.unlink()
                else:
                    fetch_blob(store, file, partial, owner)
                    os.replace(partial, target)

    def _assemble(self, record: AdapterRecord) -> None:
        """Link the blobs into the adapter's directory, in place of damaged files if there are any."""
        directory = self.directory / "adapters" / record.digest
        directory.mkdir(parents=True, exist_ok=True)
        lease(directory)
        for file in record.files:
            path = directory / file.path
            if _matches(path, file):
                continue
            new = directory / f".{secrets.token_hex(8)}"
            # The blob may be gone, or the directory, trimmed away before they were in use: there is another round.
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _link(self.directory / "blobs" / file.sha256, new)
                # It may have come under another name, of another type.
                check_content(new, file.path)
                os.replace(new, path)
            except FileNotFoundError:
                continue
            finally:
                new.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Blobs of no adapter, and downloads that were cut short; not those that somebody is about to use."""
        for path, facts in _files(self.directory / "blobs"):
            if facts.st_nlink == 1 and facts.st_mtime < time.time() - FRESH_S:
                with suppress(FileNotFoundError), locked(path, os.O_RDWR) as mine:
                    if mine:
                        path.unlink(missing_ok=True)

    def _manifest(self, digest: str) -> Path:
        return self.directory / "manifests" / f"{digest}.json"

    def _unfit(self, what: str) -> RegistryError:
        return RegistryError(
            f"cache {self.directory} cannot be used: {what}. Free the cause (disk space, permissions), delete it, or "
            "choose another with DIFFUSION_BLEND_CACHE_DIR"
        )


def _remove(directory: Path) -> bool:
    """Delete a directory unless somebody uses it."""
    with suppress(FileNotFoundError), locked(directory, os.O_RDONLY | os.O_DIRECTORY) as mine:
        if mine:
            gone = directory.with_name(f".{secrets.token_hex(8)}")
            os.rename(directory, gone)
            shutil.rmtree(gone)
            return True
    return False


def _unlink_last(blob: Path) -> bool:
    """Delete a blob that no adapter is linked to; one that is linked in this moment loses its name alone."""
    try:
        if blob.stat().st_nlink > 1:
            return False
        blob.unlink()
    except FileNotFoundError:
        pass
    return True


def _matches(path: Path, file: FileEntry) -> bool:
    try:
        return matches(path, file)
    except FileNotFoundError:  # trimmed away while it was looked at
        return False


def _link(blob: Path, path: Path) -> None:
    try:
        os.link(blob, path)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links here
        shutil.copyfile(blob, path)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files below a folder, but those that are gone when looked at."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                yield path, facts


def _used_at(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write(path: Path, data: bytes) -> None:
    """Put a file in place at once. What cannot be kept is read from the store again."""
    new = path.with_name(f".{secrets.token_hex(8)}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data)
        os.replace(new, path)
