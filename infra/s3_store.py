"""A store in S3 or anything that speaks its protocol, through s3fs, with If-None-Match and If-Match.

Small objects are single PUTs, which S3 makes visible whole or not at all; files may go in parts: see
infra.s3_transfers. A PUT that is repeated after its reply was lost meets its own object; every refused write is read
back before it is believed.
"""

import hashlib
import random
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from infra.artifact_files import sha256_of
from infra.errors import (
    ConflictError,
    IntegrityError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreUnreachableError,
)
from infra.s3_client import READ_DEADLINE_S, S3Client, deadline, insist
from infra.s3_transfers import SINGLE_BYTES, fetch_file, measure, send_file
from infra.settings import Settings
from infra.storage import Listed, Store

MAX_COLLISIONS = 8


class S3Store(Store):
    """s3://bucket/prefix with the endpoint and keys of the settings, else those of the AWS environment."""

    parallel = 16

    def __init__(self, url: str, settings: Settings) -> None:
        self._client = S3Client(url, settings)
        self.url = self._client.url

    def read(self, path: str) -> bytes:
        return self.read_tagged(path)[0]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        async def get() -> tuple[bytes, str]:
            answer = await self._client.request("get_object", path)
            with self._client.errors(path):
                async with answer["Body"] as body:
                    return bytes(await body.read()), str(answer["ETag"])

        return self._client.run(insist(get), READ_DEADLINE_S, path)

    def create(self, path: str, data: bytes) -> None:
        if not self._put(path, data, IfNoneMatch="*"):
            raise self._exists(path)

    def replace(self, path: str, data: bytes, etag: str) -> None:
        if not self._put(path, data, IfMatch=etag):
            raise ConflictError(f"{self.url}/{path} has changed since it was read: read it again")

    def head(self, path: str) -> str | None:
        try:
            return str(self._client.call("head_object", path)["ETag"])
        except ObjectMissingError:
            return None

    def folders(self, prefix: str) -> list[str]:
        return sorted(
            str(entry["Prefix"]).rstrip("/").rsplit("/", 1)[-1]
            for page in self._pages("list_objects_v2", prefix, Delimiter="/")
            for entry in page.get("CommonPrefixes", [])
        )

    def listing(self, prefix: str) -> list[Listed]:
        skip = len(self._inside(""))
        found = (
            Listed(str(entry["Key"])[skip:], int(entry["Size"]), entry["LastModified"])
            for page in self._pages("list_objects_v2", prefix)
            for entry in page.get("Contents", [])
            # Some servers answer with a folder that was emptied, as if it were an object.
            if not str(entry["Key"]).endswith("/")
        )
        return sorted(found, key=lambda listed: listed.path)

    def list(self, prefix: str) -> list[str]:
        return [listed.path for listed in self.listing(prefix)]

    def delete(self, path: str) -> None:
        self._client.call("delete_object", path)

    def upload(self, path: str, source: Path, *, sha256: str | None = None) -> None:
        if source.stat().st_size <= SINGLE_BYTES:
            data = source.read_bytes()
            _check(source, sha256, hashlib.sha256(data).hexdigest())
            self.create(path, data)
            self.on_bytes(len(data))
            return
        parts = measure(source)
        _check(source, sha256, parts.sha256)
        work = send_file(self._client, path, source, parts, self.on_bytes)
        if self._client.run(work, deadline(parts.size), path) is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            self.download(path, copy)
            if sha256_of(copy) != parts.sha256:
                raise self._exists(path)

    def download(self, path: str, target: Path) -> None:
        try:
            self._client.run(fetch_file(self._client, path, target, self.on_bytes), READ_DEADLINE_S, path)
        except BaseException as error:
            target.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StoreError(
                    f"{target}: {error.strerror}. Free the cause (disk space, quota) and repeat"
                ) from error
            raise

    def abort_uploads(self, before: datetime) -> int:
        aborted = 0
        top = self._inside("")
        for page in self._pages("list_multipart_uploads", ""):
            for upload in page.get("Uploads", []):
                if upload["Initiated"] < before:
                    path = str(upload["Key"])[len(top) :]
                    self._client.call("abort_multipart_upload", path, UploadId=upload["UploadId"])
                    aborted += 1
        return aborted

    def _pages(self, method: str, prefix: str, **arguments: Any) -> Sequence[dict[str, Any]]:
        async def collect() -> Sequence[dict[str, Any]]:
            pages = self._client.pages(method, prefix, Prefix=self._inside(prefix), **arguments)
            return [page async for page in pages]

        return self._client.run(collect(), READ_DEADLINE_S, prefix)

    def _inside(self, prefix: str) -> str:
        """What the keys of everything below a folder begin with."""
        key = self._client.key(prefix.rstrip("/"))
        return f"{key}/" if key else ""

    def _exists(self, path: str) -> ObjectExistsError:
        return ObjectExistsError(f"{self.url}/{path} exists already, with other content")

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        """Conditional PUT; False when refused and the object there is not this one."""
        for collision in range(MAX_COLLISIONS):
            try:
                self._client.call("put_object", path, size=len(data), Body=data, **condition)
                return True
            except (ConflictError, ObjectMissingError, StoreUnreachableError) as error:
                found = self._read_or_none(path)
                if found == data:
                    return True
                if isinstance(error, StoreUnreachableError):
                    raise
                # S3 may refuse all of several writers that meet (409): one of them has to come back.
                if found is not None or "IfMatch" in condition:
                    return False
            time.sleep(random.uniform(0, 0.1 * 2**collision))
        return False

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except ObjectMissingError:
            return None


def _check(source: Path, expected: str | None, found: str) -> None:
    if expected not in (None, found):
        raise IntegrityError(f"{source} has changed since it was hashed: start over")
