"""Object stores: local directories and S3, with create-only writes and compare-and-swap.

Paths are relative to the store's URL, with '/' between plain names. A write of bytes that are already there
counts as done: that is what one's own write looks like when its reply was lost. Callers who need a single
winner put a nonce into the bytes.
"""

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from infra.errors import ConflictError, ObjectExistsError, StoreError
from infra.settings import Settings, read_settings

PROBE_FOLDER = "probe"


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as a listing shows it; `modified` is UTC by the store's own clock."""

    path: str
    size: int
    modified: datetime


class Store(ABC):
    """What the registry asks of a store. Every method may raise StoreUnreachableError or StoreAccessError."""

    url: str
    # Requests that are worth making at a time.
    parallel = 1
    # Told how many more bytes of a file went up or down; called from any thread, so it must be quick and not fail.
    on_bytes: Callable[[int], None] = staticmethod(lambda count: None)

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The object's bytes. Raises ObjectMissingError."""

    @abstractmethod
    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """The object's bytes and an etag not newer than they are. Raises ObjectMissingError."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Write a new object, whole or not at all. Raises ObjectExistsError when other bytes are there."""

    @abstractmethod
    def replace(self, path: str, data: bytes, etag: str) -> None:
        """Write over an object that still has this etag. Raises ConflictError when it has changed."""

    @abstractmethod
    def head(self, path: str) -> str | None:
        """The object's etag; None when there is none."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""

    @abstractmethod
    def listing(self, prefix: str) -> list[Listed]:
        """All objects below a folder, with size and age, sorted by path."""

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """Paths of all objects below a folder, sorted."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""

    @abstractmethod
    def upload(self, path: str, source: Path, *, sha256: str | None = None) -> None:
        """`create` from a local file, never whole in memory; what an upload that was cut short has sent may be used.

        Raises IntegrityError when the file has not the hash that is given. In S3, a large file that others write with
        other content in the same instant may replace theirs: see infra.s3_transfers.
        """

    @abstractmethod
    def download(self, path: str, target: Path) -> None:
        """Write the object to a local file, never whole in memory. Raises ObjectMissingError; leaves nothing then."""

    @abstractmethod
    def abort_uploads(self, before: datetime) -> int:
        """Remove what uploads begun before this moment left unfinished, and count it. No reader ever sees those."""

    def probe(self) -> None:
        """Check that the store takes writes and honours conditional ones; StoreError says what it lacks.

        Meant to be called before hours of work whose result is to be stored here.
        """
        path = f"{PROBE_FOLDER}/{secrets.token_hex(16)}.json"
        first, second, third = (json.dumps({"probe": n}).encode() for n in range(3))
        self.create(path, first)
        try:
            if not _refuses(ObjectExistsError, lambda: self.create(path, second)):
                self._lacks("create-only writes (If-None-Match)")
            etag = self.read_tagged(path)[1]
            self.replace(path, second, etag)
            if not _refuses(ConflictError, lambda: self.replace(path, third, etag)):
                self._lacks("compare-and-swap (If-Match)")
        finally:
            self.delete(path)

    def _lacks(self, what: str) -> None:
        raise StoreError(
            f"store {self.url} ignores {what}, so that concurrent writers would lose each other's work: use "
            "a store that honours conditional writes (AWS S3, MinIO, SeaweedFS, Ceph, a local directory)"
        )


def _refuses(error: type[StoreError], write: Callable[[], None]) -> bool:
    try:
        write()
    except error:
        return True
    return False


def check_object_path(path: str) -> str:
    """The path itself; ValueError for one that leads out of the store (callers have validated every name)."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\0" in path or any(part in ("..", ".") for part in parts):
        raise ValueError(f"object path {path!r} must be relative, with '/' between plain names")
    return path


def open_store(url: str | None = None, settings: Settings | None = None) -> Store:
    """The store at a URL (default: the settings' store_url). Opens no connection and makes no directory.

    Raises StoreError for a URL that is neither a directory, nor file://, nor s3://bucket/prefix.
    """
    settings = settings or read_settings()
    url = url or settings.store_url
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        from infra.s3_store import S3Store

        return S3Store(url, settings)
    if parts.scheme in ("", "file") and parts.netloc in ("", "localhost") and parts.path:
        from infra.local_store import LocalStore

        return LocalStore(Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute())
    raise StoreError(
        f"store URL {url!r} is not understood: use file:///directory, a plain directory or s3://bucket/prefix"
    )
