"""Files to and from S3: in parts, never whole in memory, never sent twice, create-only."""

import asyncio
import os
import secrets
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.response import AioStreamingBody as StreamingBody
from s3_requests import cut_at, parts_of, requests_of

import infra.s3_client
from infra.artifact_files import sha256_of
from infra.blobs import blob_path, put_blob
from infra.cache import Cache
from infra.errors import IntegrityError, ObjectExistsError, StoreUnreachableError
from infra.manifests import AdapterRecord
from infra.registry import Registry
from infra.s3_store import S3Store
from infra.s3_transfers import PART_BYTES, SINGLE_BYTES, measure
from infra.settings import Settings

MIB = 1 << 20
LARGE = SINGLE_BYTES + 5 * MIB + 7


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(infra.s3_client, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """Of three parts, the last one short."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(LARGE))
    return path


@pytest.fixture
def s3_store(s3_server) -> S3Store:
    return S3Store(f"s3://{s3_server.bucket}/{secrets.token_hex(8)}", settings_of(s3_server))


def settings_of(server) -> Settings:
    return Settings(s3_endpoint_url=server.endpoint_url, s3_key=server.key, s3_secret=server.secret)


@pytest.mark.slow
def test_an_upload_cut_at_every_request_is_invisible_and_gone_on_with(s3_store: S3Store, large_file: Path):
    with requests_of(s3_store) as whole:
        s3_store.upload("whole", large_file)
    assert whole.count("upload_part") == len(measure(large_file).md5s) == 3
    for part in (1, 2, 3):
        path = f"cut-{part}"
        with requests_of(s3_store, cut_at("upload_part", part)), pytest.raises(StoreUnreachableError):
            s3_store.upload(path, large_file)
        assert s3_store.head(path) is None
        assert len(parts_of(s3_store, path)) == part - 1
        moved: list[int] = []
        s3_store.on_bytes = moved.append
        with requests_of(s3_store) as sent:
            s3_store.upload(path, large_file)
        assert sent.count("upload_part") == 4 - part
        # one without parts could be anybody's
        assert sent.count("create_multipart_upload") == (1 if part == 1 else 0)
        assert sum(moved) == LARGE
    with requests_of(s3_store, cut_at("complete_multipart_upload", 1)), pytest.raises(StoreUnreachableError):
        s3_store.upload("cut-end", large_file)
    assert s3_store.head("cut-end") is None
    with requests_of(s3_store) as sent:
        s3_store.upload("cut-end", large_file)
    assert "upload_part" not in sent
    etag = s3_store.head("whole")
    assert etag == measure(large_file).etag
    assert {s3_store.head(path) for path in s3_store.list("")} == {etag}


@pytest.mark.slow
def test_another_files_unfinished_upload_is_left_alone(s3_store: S3Store, large_file: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.write_bytes(os.urandom(PART_BYTES) + large_file.read_bytes()[PART_BYTES:])
    with requests_of(s3_store, cut_at("complete_multipart_upload", 1)), pytest.raises(StoreUnreachableError):
        s3_store.upload("x", other)
    s3_store.upload("x", large_file)
    s3_store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large_file.read_bytes()
    assert s3_store.abort_uploads(datetime.now(UTC) - timedelta(days=1)) == 0
    assert s3_store.abort_uploads(datetime.now(UTC) + timedelta(minutes=1)) == 1
    assert s3_store.abort_uploads(datetime.now(UTC) + timedelta(minutes=1)) == 0


@pytest.mark.slow
def test_an_upload_aborted_under_way_starts_over(s3_store: S3Store, large_file: Path, tmp_path: Path):
    aborted: list[str] = []

    async def abort(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        if method == "complete_multipart_upload" and not aborted:
            aborted.append(arguments["UploadId"])
            await s3_store._client.ask("abort_multipart_upload", "x", UploadId=arguments["UploadId"])

    moved: list[int] = []
    s3_store.on_bytes = moved.append
    with requests_of(s3_store, abort) as sent:
        s3_store.upload("x", large_file)
    assert (sent.count("create_multipart_upload"), sent.count("upload_part")) == (2, 6)
    assert sum(moved) == LARGE
    s3_store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large_file.read_bytes()


@pytest.mark.slow
def test_what_appears_or_changes_during_an_upload_is_noticed(s3_store: S3Store, large_file: Path):
    async def create(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        if method == "complete_multipart_upload":
            await s3_store._client.fs.s3.put_object(Bucket=arguments["Bucket"], Key=arguments["Key"], Body=b"another's")

    with requests_of(s3_store, create), pytest.raises(ObjectExistsError):
        s3_store.upload("x", large_file)
    assert s3_store.read("x") == b"another's"

    def change(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        if method == "create_multipart_upload":
            with large_file.open("r+b") as file:
                file.seek(PART_BYTES)
                file.write(bytes(8))

    with requests_of(s3_store, change), pytest.raises(IntegrityError, match="changed while it was being uploaded"):
        s3_store.upload("y", large_file)
    assert s3_store.list("") == ["x"]


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["upload_part", "complete_multipart_upload", "put_object", "get_object"])
def test_a_lost_reply_is_a_success(s3_store: S3Store, large_file: Path, tmp_path: Path, operation: str):
    """The request is done, and its reply is lost: whoever asks again meets what was done."""
    lost: list[str] = []

    async def lose(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        if method == operation and not lost:
            lost.append(method)
            await s3_store._client.fs.s3.__getattribute__(method)(**{"Bucket": s3_store._client.bucket, **arguments})
            raise ConnectionError("the reply is lost")

    small = tmp_path / "small"
    small.write_bytes(b"small")
    with requests_of(s3_store, lose):
        for path, file in (("large", large_file), ("small", small)):
            s3_store.upload(path, file)
            s3_store.download(path, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert lost == [operation]
    assert s3_store.list("") == ["large", "small"]


@pytest.mark.slow
def test_a_download_goes_on_where_its_connection_broke(s3_store: S3Store, large_file: Path, tmp_path: Path):
    s3_store.upload("x", large_file)
    ranges: list[str] = []

    async def broken(self: StreamingBody, amount: int | None = None) -> bytes:
        if self.tell() >= MIB:
            raise ConnectionResetError("cut")
        return await read(self, amount)

    read = StreamingBody.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamingBody, "read", broken)
        moved: list[int] = []
        s3_store.on_bytes = moved.append
        with requests_of(s3_store, lambda _, arguments, done: ranges.append(arguments.get("Range", ""))):
            s3_store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large_file.read_bytes()
    assert sum(moved) == LARGE
    firsts = [int(text[6:].split("-")[0]) for text in ranges if text]
    # more connections than there are tries: whoever gets on is not giving up
    assert len(firsts) >= LARGE // (2 * MIB)
    assert len(set(firsts)) == len(firsts)


@pytest.mark.slow
def test_transfers_hold_a_few_parts_in_memory_and_never_the_file(s3_store: S3Store, tmp_path: Path):
    size = 112 * MIB
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        s3_store.upload("huge", tmp_path / "huge")
        s3_store.download("huge", tmp_path / "copy")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * PART_BYTES < size
    assert sha256_of(tmp_path / "copy") == sha256_of(tmp_path / "huge")


@pytest.mark.slow
def test_a_cold_load_fetches_files_and_parts_at_the_same_time(
    s3_store: S3Store, large_file: Path, tmp_path: Path, publish: Callable[..., AdapterRecord]
):
    records = [publish(Registry(s3_store), seed) for seed in range(3)]
    in_flight, peak = 0, 0

    async def linger(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        nonlocal in_flight, peak
        in_flight += 1
        peak = max(peak, in_flight)
        await asyncio.sleep(0.05)
        in_flight -= 1

    with requests_of(s3_store, linger) as sent:
        Cache(tmp_path / "cache").adapters(s3_store, records)
    blobs = {file.sha256 for record in records for file in record.files}
    assert (sent.count("get_object"), peak) == (len(blobs), len(blobs))
    peak = 0
    s3_store.upload("large", large_file)
    with requests_of(s3_store, linger):
        s3_store.download("large", tmp_path / "copy")
    assert peak == 3


@pytest.mark.slow
def test_racing_writers_of_one_blob_all_succeed(s3_store: S3Store, s3_server, large_file: Path):
    sha256 = sha256_of(large_file)
    stores = [S3Store(s3_store.url, settings_of(s3_server)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda store: put_blob(store, sha256, large_file), stores))
    assert s3_store.list("") == [blob_path(sha256)]
    assert s3_store.head(blob_path(sha256)) == measure(large_file).etag


@pytest.mark.slow
def test_passing_failures_are_retried_and_lasting_ones_end(s3_store: S3Store):
    failures = [0]

    def fail(method: str, arguments: dict[str, Any], done: list[str]) -> None:
        if method == "put_object" and failures[0] < 3:
            failures[0] += 1
            raise TimeoutError("slow")

    with requests_of(s3_store, fail) as sent:
        s3_store.create("x", b"1")
    assert (failures[0], sent) == (3, ["put_object"])
    with requests_of(s3_store, cut_at("put_object", 1)), pytest.raises(StoreUnreachableError):
        s3_store.create("y", b"1")
    assert s3_store.list("") == ["x"]
