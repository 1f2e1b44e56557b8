"""Requests to an S3 server: one connection pool, typed errors, retries with growing pauses, a deadline for everything.

Knows no objects beyond their keys. Retries are made here and nowhere below: botocore and s3fs try once.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError
from s3fs import S3FileSystem

from infra.errors import (
    BucketMissingError,
    ConflictError,
    ObjectMissingError,
    StoreAccessError,
    StoreError,
    StoreUnreachableError,
)
from infra.settings import Settings
from infra.storage import check_object_path

CONNECT_TIMEOUT_S = 4
# Silence on an open connection.
READ_TIMEOUT_S = 15
# All tries together, for a request without a body to speak of.
REQUEST_DEADLINE_S = 60
# The slowest line that is waited for, in bytes a second, and the longest time for a body of unknown length.
SLOWEST_TRANSFER = 50_000
READ_DEADLINE_S = 3600
TRIES = 5
FIRST_PAUSE_S = 0.1

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
_PASSING = {
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "500",
    "502",
    "503",
    "504",
}

T = TypeVar("T")


class S3Client:
    """One bucket and prefix at one server. Paths are below the prefix; "" is the prefix itself."""

    def __init__(self, url: str, settings: Settings) -> None:
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self.bucket = parts.netloc
        self.prefix = parts.path.strip("/")
        self.endpoint = settings.s3_endpoint_url or "AWS"
        self.fs = S3FileSystem(
            key=settings.s3_key,
            secret=settings.s3_secret.get_secret_value() if settings.s3_secret else None,
            endpoint_url=settings.s3_endpoint_url,
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"total_max_attempts": 1},
            },
        )
        self.fs.retries = 1

    def key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, check_object_path(path) if path else "") if part)

    def run(self, work: Coroutine[Any, Any, T], seconds: float = REQUEST_DEADLINE_S, path: str = "") -> T:
        """Run a coroutine on s3fs's own loop, for no longer than this; it is cancelled when the caller is."""
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self.fs.loop)
        try:
            return future.result()
        except TimeoutError as error:
            raise self._unreachable(f"{self.url}/{path}", f"not done within {seconds:.0f} s") from error
        except BaseException:
            future.cancel()
            raise

    def call(self, method: str, path: str, *, size: int = 0, **arguments: Any) -> Any:
        """`ask`, waited for; `size` of the body makes the deadline later."""
        return self.run(self.ask(method, path, **arguments), deadline(size), path)

    async def ask(self, method: str, path: str, **arguments: Any) -> Any:
        """One S3 request on an object, until it is answered; boto's own names for method and arguments."""
        return await insist(lambda: self.request(method, path, **arguments))

    async def request(self, method: str, path: str, **arguments: Any) -> Any:
        """`ask`, tried once."""
        return await self._request(path, method, Key=self.key(check_object_path(path)), **arguments)

    async def pages(self, method: str, path: str, **arguments: Any) -> AsyncIterator[dict[str, Any]]:
        """Every page of a listing of the bucket, whichever way this method goes on from one to the next."""
        after: dict[str, Any] = {}
        while True:
            page = await insist(partial(self._request, path, method, **(arguments | after)))
            yield page
            if not page.get("IsTruncated"):
                return
            after = {
                name.removeprefix("Next"): page[name]
                for name in ("NextKeyMarker", "NextUploadIdMarker", "NextPartNumberMarker")
                if name in page
            }
            if "NextContinuationToken" in page:
                after["ContinuationToken"] = page["NextContinuationToken"]

    async def _request(self, path: str, method: str, **arguments: Any) -> Any:
        with self.errors(path):
            return await self.fs._call_s3(method, Bucket=self.bucket, **arguments)

    @contextmanager
    def errors(self, path: str) -> Iterator[None]:
        where = f"{self.url}/{path}"
        try:
            yield
        except StoreError:
            raise
        # A reply that ends in its middle is an error of aiohttp in a body, and one of the parser in anything else.
        except (
            BotoCoreError,
            ResponseParserError,
            ClientError,
            FSTimeoutError,
            ConnectionError,
            TimeoutError,
        ) as error:
            raise self._unreachable(where, type(error).__name__) from error
        except OSError as error:
            code = _code(error)
            if code == "NoSuchBucket":
                raise BucketMissingError(
                    f"bucket {self.bucket!r} does not exist at {self.endpoint}: create it, or correct "
                    "DIFFUSION_BLEND_STORE_URL"
                ) from None
            if isinstance(error, FileNotFoundError) or code in _MISSING:
                raise ObjectMissingError(f"{where} does not exist") from None
            if isinstance(error, FileExistsError) or code in _REFUSED:
                raise ConflictError(f"{where} was written by someone else at the same time") from None
            if isinstance(error, PermissionError) or code in _DENIED:
                raise StoreAccessError(
                    f"{where}: {self.endpoint} refuses these credentials ({code}). Check "
                    "DIFFUSION_BLEND_S3_KEY, DIFFUSION_BLEND_S3_SECRET and what they permit on the bucket"
                ) from None
            if code in _PASSING:
                # It may have been done all the same, like a request whose reply is lost.
                raise self._unreachable(where, code) from error
            raise StoreError(f"{where}: {self.endpoint} failed ({code}: {error}). Repeat the command") from error

    def _unreachable(self, where: str, what: str) -> StoreUnreachableError:
        return StoreUnreachableError(
            f"{where}: no answer from {self.endpoint} ({what}). Check that the server runs, and "
            "DIFFUSION_BLEND_S3_ENDPOINT_URL and DIFFUSION_BLEND_STORE_URL"
        )


def deadline(size: int) -> float:
    """Seconds within which a transfer of this many bytes must be done, all tries together."""
    return REQUEST_DEADLINE_S + size / SLOWEST_TRANSFER


async def insist(request: Callable[[], Awaitable[T]]) -> T:
    """Try again after failures that pass, with pauses that double and are half left to chance."""
    for failures in range(TRIES - 1):
        try:
            return await request()
        except StoreUnreachableError:
            await asyncio.sleep(random.uniform(0.5, 1) * FIRST_PAUSE_S * 2**failures)
    return await request()


async def in_parallel(jobs: Iterable[Callable[[], Awaitable[None]]], width: int) -> None:
    """Do all jobs, `width` at a time; the first failure ends the rest."""
    queue = iter(jobs)

    async def work() -> None:
        for job in queue:
            await job()

    workers = [asyncio.ensure_future(work()) for _ in range(width)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _code(error: BaseException | None) -> str:
    """The server's error code; s3fs translates some to OSError subclasses and others to a bare errno 22."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""
