"""Blobs: the bytes of records' files, each stored once under its SHA-256 and hashed again whenever it is read."""

import hashlib
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from infra.artifact_files import check_content, matches, sha256_of
from infra.errors import IntegrityError, ObjectExistsError, ObjectMissingError, RegistryError
from infra.manifests import AdapterRecord, FileEntry
from infra.storage import Store


def blob_path(sha256: str) -> str:
    return f"blobs/sha256/{sha256}"


def put_blob(store: Store, sha256: str, source: bytes | Path) -> None:
    """Store bytes or a file under their hash; what is there already is read and hashed, never trusted.

    Raises IntegrityError when the store holds other bytes under this hash, or `source` is not what was hashed.
    """
    path = blob_path(sha256)
    if isinstance(source, bytes) and hashlib.sha256(source).hexdigest() != sha256:
        raise IntegrityError(f"bytes to be stored as {sha256[:12]} have another hash: publish again")
    with suppress(ObjectExistsError):
        if store.head(path) is None:
            if isinstance(source, Path):
                store.upload(path, source, sha256=sha256)
            else:
                store.create(path, source)
            return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "blob"
        store.download(path, copy)
        if sha256_of(copy) != sha256:
            raise IntegrityError(f"{store.url}/{path} is damaged: delete it and publish again")


def fetch_blob(store: Store, file: FileEntry, target: Path, owner: str) -> None:
    """Download one file of `owner` and hash it; nothing is left at `target` when it is refused.

    Raises IntegrityError naming file, owner and blob; UnsafeFileError for content that has no business there.
    """
    path = blob_path(file.sha256)
    try:
        store.download(path, target)
    except ObjectMissingError:
        raise IntegrityError(
            f"{file.path} of {owner} is lost: {store.url}/{path} does not exist. Publish it again"
        ) from None
    try:
        if not matches(target, file):
            raise IntegrityError(
                f"{file.path} of {owner} is damaged: {store.url}/{path} has {target.stat().st_size} bytes and hash "
                f"{sha256_of(target)[:12]}, published were {file.size} bytes and {file.sha256[:12]}. Delete that "
                "blob and publish the adapter again, or restore it from a copy of the store"
            )
        check_content(target, file.path)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def fetch_adapter(store: Store, record: AdapterRecord, directory: Path) -> Path:
    """Write an adapter's files to a new or empty directory: all, hashed, or none.

    Raises RegistryError when the directory holds something, IntegrityError as `fetch_blob` does.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise RegistryError(f"{directory} is not an empty directory: name a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}-{secrets.token_hex(8)}"
    try:
        for file in record.files:
            target = staging / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch_blob(store, file, target, f"adapter {record.ref}")
        os.rename(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory
