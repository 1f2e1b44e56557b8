"""A store in a local directory: link for create-only, lock and rename for compare-and-swap, fsync first."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from infra.errors import ConflictError, ObjectExistsError, ObjectMissingError, StoreAccessError, StoreError
from infra.storage import Listed, Store, check_object_path

# Of a file system without hard links (FAT, some network mounts).
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


_UNFINISHED = ".unfinished-"


class LocalStore(Store):
    """Names beginning with '.' are the store's own: unfinished writes and the lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}"

    def read(self, path: str) -> bytes:
        with self._errors(path):
            return self._at(path).read_bytes()

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, hashlib.sha256(data).hexdigest()

    def create(self, path: str, data: bytes) -> None:
        with self._errors(path), self._written(path, lambda file: file.write(data)) as written:
            if not self._place(written, self._at(path)) and self._at(path).read_bytes() != data:
                raise ObjectExistsError(f"{self.url}/{path} exists already, with other content")

    def upload(self, path: str, source: Path) -> None:
        def copy(file: BinaryIO) -> None:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file)

        with self._errors(path), self._written(path, copy) as written:
            if not self._place(written, self._at(path)) and not _same(written, self._at(path)):
                raise ObjectExistsError(f"{self.url}/{path} exists already, with other content")

    def replace(self, path: str, data: bytes, etag: str) -> None:
        with (
            self._errors(path),
            self._written(path, lambda file: file.write(data)) as written,
            self._lock(),
        ):
            current = self.read(path)
            if current == data:
                return
            if hashlib.sha256(current).hexdigest() != etag:
                raise ConflictError(f"{self.url}/{path} has changed since it was read: read it again")
            os.rename(written, self._at(path))
            _sync(self._at(path).parent)

    def head(self, path: str) -> str | None:
        try:
            return self.read_tagged(path)[1]
        except ObjectMissingError:
            return None

    def folders(self, prefix: str) -> list[str]:
        top = self._at(prefix) if prefix else self.root
        if not top.is_dir():
            return []
        with self._errors(prefix), os.scandir(top) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))

    def listing(self, prefix: str) -> list[Listed]:
        found = []
        for path in self.list(prefix):
            # Deleted since it was listed.
            with suppress(ObjectMissingError), self._errors(path):
                facts = self._at(path).stat()
                found.append(Listed(path, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC)))
        return found

    def list(self, prefix: str) -> list[str]:
        top = self._at(prefix) if prefix else self.root
        found: list[str] = []
        with self._errors(prefix):
            for folder, folders, files in os.walk(top, onerror=_unless_missing):
                folders[:] = [name for name in folders if not name.startswith(".")]
                here = Path(folder).relative_to(self.root)
                found += [(here / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def delete(self, path: str) -> None:
        with self._errors(path):
            self._at(path).unlink(missing_ok=True)

    def download(self, path: str, target: Path) -> None:
        try:
            with self._errors(path):
                shutil.copyfile(self._at(path), target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def abort_uploads(self, before: datetime) -> int:
        aborted = 0
        with self._errors(""):
            for unfinished in self.root.rglob(f"{_UNFINISHED}*"):
                with suppress(FileNotFoundError):
                    if unfinished.stat().st_mtime < before.timestamp():
                        unfinished.unlink()
                        aborted += 1
        return aborted

    def _at(self, path: str) -> Path:
        return self.root / check_object_path(path)

    @contextmanager
    def _written(self, path: str, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
        """An unfinished file beside the object, on disk for good; removed at the end whatever happened."""
        folder = self._at(path).parent
        _make_folders(folder)
        unfinished = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
        try:
            with unfinished.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield unfinished
        finally:
            unfinished.unlink(missing_ok=True)

    def _place(self, written: Path, target: Path) -> bool:
        """Give the finished file its name unless the name is taken; True when this call did it."""
        try:
            os.link(written, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self._lock():
                if target.exists():
                    return False
                os.rename(written, target)
        _sync(target.parent)
        return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time over the whole store; the kernel lets go when a writer dies."""
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        where = f"{self.url}/{path}"
        try:
            yield
        except FileNotFoundError:
            raise ObjectMissingError(f"{where} does not exist") from None
        except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise StoreAccessError(
                f"{where} is not accessible: {error.strerror}. Change its permissions, or choose another "
                "directory with DIFFUSION_BLEND_STORE_URL"
            ) from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise StoreAccessError(f"{where} is on a read-only file system: choose another store") from error
            raise StoreError(
                f"{where}: {error.strerror}. Nothing was committed; free the cause (disk space, quota, disk "
                "errors) and repeat"
            ) from error


def _unless_missing(error: OSError) -> None:
    """What cannot be looked at must not look empty; what was deleted meanwhile is."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _same(one: Path, other: Path) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        return hashlib.file_digest(left, "sha256").digest() == hashlib.file_digest(right, "sha256").digest()


def _make_folders(folder: Path) -> None:
    """mkdir -p, each new name on disk before anything is put below it."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
