"""A store in S3 or anything that speaks its protocol, through s3fs, with If-None-Match and If-Match.

Object writes are single PUTs (at most 5 GB), which S3 makes visible whole or not at all. s3fs repeats a PUT
whose reply was lost and then meets its own object; every refused write is read back before it is believed.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError as ConnectionBroken
from botocore.exceptions import BotoCoreError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from s3fs import S3FileSystem

from infra.errors import (
    BucketMissingError,
    ConflictError,
    ObjectExistsError,
    ObjectMissingError,
    StoreAccessError,
    StoreError,
    StoreUnreachableError,
)
from infra.settings import Settings
from infra.storage import Listed, Store, check_object_path

CONNECT_TIMEOUT_S = 4
# Silence on an open connection. botocore tries twice, and s3fs has it tried twice.
READ_TIMEOUT_S = 15
# All tries together, for a request without a body to speak of.
REQUEST_DEADLINE_S = 60
# The slowest line that is waited for, in bytes a second, and the longest time for a body of unknown length.
SLOWEST_TRANSFER = 50_000
READ_DEADLINE_S = 3600
MAX_COLLISIONS = 8

_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "Forbidden",
    "401",
    "403",
}
_MISSING = {"NoSuchKey", "NotFound", "404"}
_REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


class S3Store(Store):
    """s3://bucket/prefix with the endpoint and keys of the settings, else those of the AWS environment."""

    def __init__(self, url: str, settings: Settings) -> None:
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self.bucket = parts.netloc
        self.prefix = parts.path.strip("/")
        self.endpoint = settings.s3_endpoint_url or "AWS"
        self._fs = S3FileSystem(
            key=settings.s3_key,
            secret=settings.s3_secret.get_secret_value() if settings.s3_secret else None,
            endpoint_url=settings.s3_endpoint_url,
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"total_max_attempts": 2, "mode": "standard"},
            },
        )
        self._fs.retries = 2

    def read(self, path: str) -> bytes:
        return self._read(path)

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        # The etag first: should the object change in between, a later `replace` fails and loses nothing.
        etag = self.head(path)
        if etag is None:
            raise ObjectMissingError(f"{self.url}/{path} does not exist")
        return self._read(path), etag

    def create(self, path: str, data: bytes) -> None:
        if not self._put(path, data, IfNoneMatch="*"):
            raise ObjectExistsError(f"{self.url}/{path} exists already, with other content")

    def replace(self, path: str, data: bytes, etag: str) -> None:
        if not self._put(path, data, IfMatch=etag):
            raise ConflictError(f"{self.url}/{path} has changed since it was read: read it again")

    def head(self, path: str) -> str | None:
        try:
            return str(self._call("head_object", path)["ETag"])
        except ObjectMissingError:
            return None

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            try:
                entries = self._wait(self._fs._ls, self._key(prefix, bucket=True), detail=True, refresh=True)
            except FileNotFoundError as error:
                self._refuse_missing_bucket(error)
                return []
        return sorted(str(entry["name"]).rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

    def listing(self, prefix: str) -> list[Listed]:
        with self._errors(prefix):
            key = self._key(prefix, bucket=True)
            found = self._wait(self._fs._find, key, detail=True, refresh=True, seconds=READ_DEADLINE_S)
        skip = len(self._key("", bucket=True)) + 1
        # Some servers answer with a folder that was emptied, as if it were an object.
        inside = f"{prefix.rstrip('/')}/" if prefix else ""
        return sorted(
            (
                Listed(path, int(entry["size"]), entry["LastModified"])
                for name, entry in found.items()
                if (path := str(name)[skip:]).startswith(inside) and path != inside
            ),
            key=lambda listed: listed.path,
        )

    def list(self, prefix: str) -> list[str]:
        return [listed.path for listed in self.listing(prefix)]

    def delete(self, path: str) -> None:
        self._call("delete_object", path)

    def upload(self, path: str, source: Path) -> None:
        self.create(path, source.read_bytes())

    def download(self, path: str, target: Path) -> None:
        data = self._read(path)
        try:
            target.write_bytes(data)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def abort_uploads(self, before: datetime) -> int:
        aborted = 0
        after: dict[str, Any] = {}
        prefix = f"{self.prefix}/" if self.prefix else ""
        while True:
            with self._errors(""):
                page = self._wait(
                    self._fs._call_s3, "list_multipart_uploads", Bucket=self.bucket, Prefix=prefix, **after
                )
            for upload in page.get("Uploads", []):
                if upload["Initiated"] < before:
                    path = str(upload["Key"]).removeprefix(prefix)
                    self._call("abort_multipart_upload", path, UploadId=upload["UploadId"])
                    aborted += 1
            if not page.get("IsTruncated"):
                return aborted
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _key(self, path: str, *, bucket: bool = False) -> str:
        parts = ([self.bucket] if bucket else []) + [self.prefix, check_object_path(path) if path else ""]
        return "/".join(part for part in parts if part)

    def _read(self, path: str) -> bytes:
        with self._errors(path):
            return bytes(self._wait(self._fs._cat_file, self._key(path, bucket=True), seconds=READ_DEADLINE_S))

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        """Conditional PUT; False when refused and the object there is not this one."""
        for collision in range(MAX_COLLISIONS):
            try:
                self._call("put_object", path, size=len(data), Body=data, **condition)
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
            return self._read(path)
        except ObjectMissingError:
            return None

    def _call(self, method: str, path: str, *, size: int = 0, **arguments: Any) -> Any:
        """One S3 request on an object; boto's own names for method and arguments."""
        seconds = REQUEST_DEADLINE_S + size / SLOWEST_TRANSFER
        with self._errors(path):
            return self._wait(
                self._fs._call_s3,
                method,
                seconds=seconds,
                Bucket=self.bucket,
                Key=self._key(check_object_path(path)),
                **arguments,
            )

    def _wait(self, request: Any, *arguments: Any, seconds: float = REQUEST_DEADLINE_S, **options: Any) -> Any:
        """Run a coroutine of s3fs on its own loop, no longer than this many seconds."""
        return sync(self._fs.loop, request, *arguments, timeout=seconds, **options)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        where = f"{self.url}/{path}"
        try:
            yield
        except StoreError:
            raise
        # A reply that ends in the middle is an aiohttp error in a body, and one of the parser in anything else.
        except (
            BotoCoreError,
            ResponseParserError,
            ConnectionBroken,
            FSTimeoutError,
            ConnectionError,
            TimeoutError,
        ) as error:
            raise StoreUnreachableError(
                f"{where}: no answer from {self.endpoint} ({type(error).__name__}). Check that the server "
                "runs, and DIFFUSION_BLEND_S3_ENDPOINT_URL and DIFFUSION_BLEND_STORE_URL"
            ) from error
        except OSError as error:
            code = _code(error)
            self._refuse_missing_bucket(error)
            if isinstance(error, FileNotFoundError) or code in _MISSING:
                raise ObjectMissingError(f"{where} does not exist") from None
            if isinstance(error, FileExistsError) or code in _REFUSED:
                raise ConflictError(f"{where} was written by someone else at the same time") from None
            if isinstance(error, PermissionError) or code in _DENIED:
                raise StoreAccessError(
                    f"{where}: {self.endpoint} refuses these credentials ({code}). Check "
                    "DIFFUSION_BLEND_S3_KEY, DIFFUSION_BLEND_S3_SECRET and what they permit on the bucket"
                ) from None
            raise StoreError(f"{where}: {self.endpoint} failed ({code}: {error}). Repeat the command") from error

    def _refuse_missing_bucket(self, error: OSError) -> None:
        if _code(error) == "NoSuchBucket":
            raise BucketMissingError(
                f"bucket {self.bucket!r} does not exist at {self.endpoint}: create it, or correct "
                "DIFFUSION_BLEND_STORE_URL"
            ) from None


def _code(error: BaseException | None) -> str:
    """The server's error code; s3fs translates some to OSError subclasses and others to a bare errno 22."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""
