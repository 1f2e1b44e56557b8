"""Watches, breaks and delays the requests of an S3 store in front of a real server."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from infra.s3_store import S3Store

Before = Callable[[str, dict[str, Any], list[str]], Any]


@contextmanager
def requests_of(store: S3Store, before: Before = lambda *_: None) -> Iterator[list[str]]:
    """Operations that were done; `before`, maybe async, is told of each first and may raise in its stead."""
    done: list[str] = []
    call_s3 = store._client.fs._call_s3

    async def watched(method: str, *positional: Any, **arguments: Any) -> Any:
        if (waiting := before(method, arguments, done)) is not None:
            await waiting
        answer = await call_s3(method, *positional, **arguments)
        done.append(method)
        return answer

    store._client.fs._call_s3 = watched
    try:
        yield done
    finally:
        store._client.fs._call_s3 = call_s3


def cut_at(operation: str, count: int) -> Before:
    """Break every connection from the n-th such request on, once those before it are done."""
    seen: list[str] = []

    async def cut(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        seen.append(method)
        if seen.count(operation) >= count:
            while done.count(operation) < count - 1:
                await asyncio.sleep(0.01)
            raise ConnectionError("cut")

    return cut


def parts_of(store: S3Store, path: str) -> list[dict[str, Any]]:
    """Parts that the server holds of the newest unfinished upload."""
    uploads = store._client.fs.call_s3(
        "list_multipart_uploads", Bucket=store._client.bucket, Prefix=store._client.key(path)
    ).get("Uploads", [])
    if not uploads:
        return []
    return store._client.call("list_parts", path, UploadId=uploads[-1]["UploadId"]).get("Parts", [])
