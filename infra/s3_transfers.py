"""Files to and from S3 in parts, several at a time; a part is all that is ever in memory.

An upload that was cut short is gone on with: parts that the server holds, by their MD5, are not sent again.
A download goes on from the byte where its connection broke.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from infra.errors import (
    ConflictError,
    IntegrityError,
    ObjectMissingError,
    StoreAccessError,
    StoreError,
    StoreUnreachableError,
)
from infra.s3_client import FIRST_PAUSE_S, S3Client, deadline, in_parallel, insist

# S3 takes parts of 5 MiB and more, and 10,000 of them.
PART_BYTES = 8 << 20
MAX_PARTS = 10_000
# Files up to this size go in one request.
SINGLE_BYTES = 2 * PART_BYTES
CHUNK_BYTES = 1 << 20
PARALLEL = 4
MAX_ROUNDS = 4
# Unfinished uploads of one object that are looked at.
MAX_UPLOADS = 8


@dataclass(frozen=True, slots=True)
class Parts:
    """A file's parts as they are to be sent, from one reading of it."""

    size: int
    part_size: int
    md5s: tuple[str, ...]
    sha256: str

    @property
    def etag(self) -> str:
        """What S3 calls an object of these parts: tells that it holds the same bytes, if it does."""
        return f'"{_md5(b"".join(map(bytes.fromhex, self.md5s)))}-{len(self.md5s)}"'

    def length(self, number: int) -> int:
        """Bytes in a part; numbers count from 1, as S3's do."""
        return min(self.part_size, self.size - (number - 1) * self.part_size)


def measure(source: Path) -> Parts:
    """Hash a file, whole and by parts."""
    part_size = PART_BYTES
    while source.stat().st_size > part_size * MAX_PARTS:
        part_size *= 2
    whole, size, md5s = hashlib.sha256(), 0, []
    with source.open("rb") as file:
        while part := file.read(part_size):
            whole.update(part)
            md5s.append(_md5(part))
            size += len(part)
    return Parts(size, part_size, tuple(md5s), whole.hexdigest())


async def send_file(
    client: S3Client, path: str, source: Path, parts: Parts, on_bytes: Callable[[int], None]
) -> str | None:
    """Write a new object from a file; None when that is done, else the etag of the object that is there already.

    Create-only by If-None-Match on the last request. SeaweedFS 4.48 looks at it too early: of uploads that end in
    the same instant several may succeed, and the last one stays. So only content-addressed objects, equal whoever
    writes them, may be sent like this by several writers at a time; who must win alone creates a small manifest.
    """
    own = {parts.etag}
    upload, told = "", set[int]()

    def tell(number: int) -> None:
        if number not in told:
            told.add(number)
            on_bytes(parts.length(number))

    for round_number in range(MAX_ROUNDS):
        there = await _head(client, path)
        if there is not None:
            break
        await asyncio.sleep(FIRST_PAUSE_S * round_number)
        try:
            upload, sent = await _unfinished(client, path, parts)
            upload = upload or (await client.ask("create_multipart_upload", path))["UploadId"]
            await _send_parts(client, path, source, parts, upload, sent, tell)
            own.add(await _complete(client, path, upload, sent))
        except (ConflictError, ObjectMissingError):
            # Refused, or the upload is gone: ended by another writer of the same file, or aborted as stale.
            continue
    else:
        there = await _head(client, path)
    if there in own:
        return None
    if there is None:
        raise StoreUnreachableError(f"{client.url}/{path}: something aborts every upload of it. Try again later")
    if upload:
        with suppress(ObjectMissingError):
            await client.ask("abort_multipart_upload", path, UploadId=upload)
    return there


async def fetch_file(client: S3Client, path: str, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Write an object to a local file. Raises ObjectMissingError; ConflictError when it is replaced meanwhile."""
    facts = await client.ask("head_object", path)
    size, etag = int(facts["ContentLength"]), str(facts["ETag"])
    with target.open("wb") as file:
        jobs = (
            partial(_fetch_range, client, path, etag, file, start, min(start + PART_BYTES, size), on_bytes)
            for start in range(0, size, PART_BYTES)
        )
        async with asyncio.timeout(deadline(size)):
            await in_parallel(jobs, PARALLEL)


async def _head(client: S3Client, path: str) -> str | None:
    try:
        return str((await client.ask("head_object", path))["ETag"])
    except ObjectMissingError:
        return None


async def _unfinished(client: S3Client, path: str, parts: Parts) -> tuple[str, dict[int, str]]:
    """An upload of this very file that was cut short, and the etags of its parts by number; "" for none.

    One with any part that is not ours is not touched. The server compares all parts once more at the end.
    """
    upload, sent = "", dict[int, str]()
    # Who may write need not be allowed to list.
    with suppress(StoreAccessError):
        key = client.key(path)
        found: list[str] = []
        async for page in client.pages("list_multipart_uploads", path, Prefix=key):
            found += [str(entry["UploadId"]) for entry in page.get("Uploads", []) if entry["Key"] == key]
        for candidate in found[-MAX_UPLOADS:]:
            with suppress(ObjectMissingError):
                there = await _sent(client, path, candidate, parts)
                if len(there) > len(sent):
                    upload, sent = candidate, there
    return upload, sent


async def _sent(client: S3Client, path: str, upload: str, parts: Parts) -> dict[int, str]:
    etags = {}
    async for page in client.pages("list_parts", path, Key=client.key(path), UploadId=upload):
        for part in page.get("Parts", []):
            number, etag = int(part["PartNumber"]), str(part["ETag"])
            if number > len(parts.md5s) or etag.strip('"') != parts.md5s[number - 1]:
                return {}
            etags[number] = etag
    return etags


async def _send_parts(
    client: S3Client,
    path: str,
    source: Path,
    parts: Parts,
    upload: str,
    sent: dict[int, str],
    tell: Callable[[int], None],
) -> None:
    """Send the parts that are not in `sent`, and enter them there."""

    async def send(number: int) -> None:
        body = await asyncio.to_thread(_read_part, source, parts, number)
        answer = await client.ask("upload_part", path, UploadId=upload, PartNumber=number, Body=body)
        sent[number] = str(answer["ETag"])
        tell(number)

    for number in sent:
        tell(number)
    numbers = [number for number in range(1, len(parts.md5s) + 1) if number not in sent]
    await in_parallel([partial(send, number) for number in numbers], PARALLEL)


async def _complete(client: S3Client, path: str, upload: str, sent: dict[int, str]) -> str:
    """Make the object of its parts; its etag."""
    listed = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(sent.items())]
    answer = await client.ask(
        "complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": listed}, IfNoneMatch="*"
    )
    return str(answer["ETag"])


def _read_part(source: Path, parts: Parts, number: int) -> bytes:
    with source.open("rb") as file:
        file.seek((number - 1) * parts.part_size)
        body = file.read(parts.length(number))
    if _md5(body) != parts.md5s[number - 1]:
        raise IntegrityError(f"{source} changed while it was being uploaded: upload it again")
    return body


async def _fetch_range(
    client: S3Client, path: str, etag: str, file: BinaryIO, start: int, end: int, on_bytes: Callable[[int], None]
) -> None:
    done = start

    async def more() -> None:
        """Fetch on from where the last connection broke; a failure is one only where nothing came at all."""
        nonlocal done
        before = done
        answer = await client.request("get_object", path, Range=f"bytes={done}-{end - 1}", IfMatch=etag)
        if not str(answer.get("ContentRange", "")).startswith(f"bytes {done}-"):
            raise StoreError(
                f"{client.url}: {client.endpoint} does not send parts of an object: use a server that does"
            )
        try:
            async with answer["Body"] as body:
                while done < end:
                    with client.errors(path):
                        chunk = await body.read(min(CHUNK_BYTES, end - done))
                        if not chunk:
                            raise TimeoutError("the body ended early")
                    os.pwrite(file.fileno(), chunk, done)
                    done += len(chunk)
                    on_bytes(len(chunk))
        except StoreUnreachableError:
            if done == before:
                raise

    while done < end:
        await insist(more)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
