"""A store in memory for tests that put requests of several processes in any order: its clock and faults are theirs."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from infra.errors import ConflictError, ObjectExistsError, ObjectMissingError, StoreUnreachableError
from infra.storage import Listed, Store


class ModelStore(Store):
    """Stamps objects by `now`. The write after the next `losing` ones gets no answer; it is done when it `arrive`s."""

    url = "memory://"

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.losing: int | None = None
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._late: builtins.list[Callable[[], object]] = []

    def arrive(self) -> None:
        """Do the writes whose callers gave up."""
        late, self._late = self._late, []
        for write in late:
            write()

    def read(self, path: str) -> bytes:
        if path not in self._objects:
            raise ObjectMissingError(path)
        return self._objects[path][0]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        return self.read(path), sha256(self.read(path)).hexdigest()

    def create(self, path: str, data: bytes) -> None:
        self._write(lambda: self._objects.setdefault(path, (data, self.now)))
        if self.read(path) != data:
            raise ObjectExistsError(path)

    def replace(self, path: str, data: bytes, etag: str) -> None:
        def swap() -> None:
            if self.head(path) == etag:
                self._objects[path] = (data, self.now)

        self._write(swap)
        if self.read(path) != data:
            raise ConflictError(path)

    def head(self, path: str) -> str | None:
        return self.read_tagged(path)[1] if path in self._objects else None

    def folders(self, prefix: str) -> builtins.list[str]:
        skip = len(prefix) + 1
        return sorted({path[skip:].split("/")[0] for path in self._objects if path.startswith(f"{prefix}/")})

    def listing(self, prefix: str) -> builtins.list[Listed]:
        found = sorted(path for path in self._objects if path.startswith(f"{prefix}/"))
        return [Listed(path, len(self._objects[path][0]), self._objects[path][1]) for path in found]

    def list(self, prefix: str) -> builtins.list[str]:
        return [listed.path for listed in self.listing(prefix)]

    def delete(self, path: str) -> None:
        self._write(lambda: self._objects.pop(path, None))

    def abort_uploads(self, before: datetime) -> int:
        return 0

    def upload(self, path: str, source: Path) -> None:
        self.create(path, source.read_bytes())

    def download(self, path: str, target: Path) -> None:
        target.write_bytes(self.read(path))

    def _write(self, write: Callable[[], object]) -> None:
        if self.losing is not None:
            self.losing -= 1
        if self.losing == -1:
            self.losing = None
            self._late.append(write)
            raise StoreUnreachableError("no answer")
        write()
