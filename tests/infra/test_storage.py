"""Stores: whole writes, one winner per create, no lost update, and errors that say what to do."""

import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import infra.s3_client
from infra.errors import (
    BucketMissingError,
    ConflictError,
    ObjectExistsError,
    ObjectMissingError,
    StoreAccessError,
    StoreError,
    StoreUnreachableError,
)
from infra.local_store import LocalStore
from infra.settings import Settings
from infra.storage import Store, open_store

WRITERS = 4


def test_objects_are_written_read_listed_and_deleted(store: Store, tmp_path: Path):
    store.create("a/b/one.json", b"1")
    store.create("a/c/two.json", b"2")
    store.create("a/three.json", b"3")
    assert store.read("a/b/one.json") == b"1"
    assert store.list("a") == ["a/b/one.json", "a/c/two.json", "a/three.json"]
    assert store.list("a/b") == ["a/b/one.json"]
    assert store.folders("a") == ["b", "c"]
    assert store.list("nothing") == store.folders("nothing") == []
    store.download("a/c/two.json", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"2"
    store.upload("a/four.json", tmp_path / "two")
    assert store.read("a/four.json") == b"2"
    store.delete("a/b/one.json")
    store.delete("a/b/one.json")
    assert store.head("a/b/one.json") is None
    assert store.list("a/b") == []


def test_an_absent_object_is_named(store: Store, tmp_path: Path):
    with pytest.raises(ObjectMissingError, match=r"no/such\.json does not exist"):
        store.read("no/such.json")
    with pytest.raises(ObjectMissingError, match=r"no/such\.json"):
        store.download("no/such.json", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert store.head("no/such.json") is None


def test_create_keeps_what_is_there(store: Store, tmp_path: Path):
    store.create("x", b"first")
    with pytest.raises(ObjectExistsError, match="exists already"):
        store.create("x", b"second")
    (tmp_path / "second").write_bytes(b"second")
    with pytest.raises(ObjectExistsError):
        store.upload("x", tmp_path / "second")
    assert store.read("x") == b"first"


def test_a_repeated_create_of_the_same_bytes_succeeds_as_after_a_lost_reply(store: Store):
    store.create("x", b"mine")
    store.create("x", b"mine")
    etag = store.read_tagged("x")[1]
    store.replace("x", b"next", etag)
    store.replace("x", b"next", etag)
    assert store.read("x") == b"next"


def test_replace_refuses_an_object_that_changed_or_vanished(store: Store):
    store.create("x", b"1")
    data, etag = store.read_tagged("x")
    assert (data, etag) == (b"1", store.head("x"))
    store.replace("x", b"2", etag)
    with pytest.raises(ConflictError, match="has changed"):
        store.replace("x", b"3", etag)
    assert store.read("x") == b"2"
    with pytest.raises((ConflictError, ObjectMissingError)):
        store.replace("never-written", b"3", etag)
    assert store.head("never-written") is None


def test_racing_creates_have_one_winner(store: Store):
    for round_number in range(5):
        barrier = threading.Barrier(WRITERS)

        def attempt(writer: int, path: str = f"race/{round_number}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                store.create(path, f"writer {writer}".encode() * 1000)
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(WRITERS) as pool:
            won = list(pool.map(attempt, range(WRITERS)))
        assert won.count(True) == 1
        assert store.read(f"race/{round_number}") == f"writer {won.index(True)}".encode() * 1000


def test_racing_replaces_lose_no_update(settings: Settings):
    open_store(settings=settings).create("counter", b"0")
    increments = 6

    def count(writer: int) -> None:
        store = open_store(settings=settings)
        done = 0
        while done < increments:
            value, etag = store.read_tagged("counter")
            try:
                # padding makes every write unique, as equal bytes count as one's own
                store.replace("counter", f"{int(value) + 1}".encode() + b" " * writer, etag)
                done += 1
            except ConflictError:
                continue

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(count, range(WRITERS)))
    assert int(open_store(settings=settings).read("counter")) == WRITERS * increments


def test_probe_accepts_a_store_with_conditional_writes_and_leaves_nothing(store: Store):
    store.probe()
    assert store.list("") == []


@pytest.mark.parametrize(("missing", "words"), [("create", "If-None-Match"), ("replace", "If-Match")])
def test_probe_refuses_a_store_that_ignores_conditions(tmp_path: Path, missing: str, words: str):
    class Careless(LocalStore):
        pass

    def overwrite(self: LocalStore, path: str, data: bytes, etag: str = "") -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    setattr(Careless, missing, overwrite)
    with pytest.raises(StoreError, match=f"ignores .*{words}.*use a store that honours"):
        Careless(tmp_path).probe()


def test_an_interrupted_local_write_is_invisible(tmp_path: Path):
    """A writer is killed while its bytes are going to disk: readers see nothing, the next writer succeeds."""
    script = (
        "import os, sys\n"
        "from infra.local_store import LocalStore\n"
        "class Slow(bytes): pass\n"
        "store = LocalStore(__import__('pathlib').Path(sys.argv[1]))\n"
        "def die(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
        "with store._written('folder/object', die): pass\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert result.returncode == -9
    store = LocalStore(tmp_path)
    assert store.list("") == []
    assert len(list((tmp_path / "folder").iterdir())) == 1
    store.create("folder/object", b"whole")
    assert store.list("") == ["folder/object"]


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path):
    script = (
        "import pathlib, resource, signal, sys\n"
        "from infra.errors import StoreError\n"
        "from infra.local_store import LocalStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    LocalStore(pathlib.Path(sys.argv[1])).create('folder/object', b'x' * 100_000)\n"
        "except StoreError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "folder/object" in result.stdout
    assert "Nothing was committed" in result.stdout
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_store_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    store = open_store(f"file://{tmp_path}/file")
    with pytest.raises(StoreAccessError, match="DIFFUSION_BLEND_STORE_URL"):
        store.probe()


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "file://otherhost/x", "memory://x", "file://"])
def test_a_url_that_is_no_store_is_refused(url: str):
    with pytest.raises(StoreError, match=r"use file:///directory, a plain directory or s3://bucket/prefix"):
        open_store(url, Settings())


def test_a_plain_directory_and_a_file_url_are_the_same_store(tmp_path: Path):
    open_store(str(tmp_path / "with space")).create("x", b"1")
    assert open_store(f"file://{tmp_path}/with%20space").read("x") == b"1"


@pytest.mark.parametrize("path", ["../up", "/absolute", "a/../../b", "", "nul\0"])
def test_no_path_leads_out_of_a_store(store: Store, path: str):
    with pytest.raises(ValueError, match="must be relative"):
        store.create(path, b"")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_address_where_nothing_listens_fails_soon_and_clearly():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        settings = Settings(
            s3_endpoint_url=f"http://127.0.0.1:{closed.getsockname()[1]}", s3_key="key", s3_secret="hidden-secret"
        )
        store = open_store("s3://bucket-name/prefix", settings)
        for call in (lambda: store.read("x"), lambda: store.create("x", b""), lambda: store.folders(""), store.probe):
            with pytest.raises(StoreUnreachableError, match=r"127\.0\.0\.1.*Check that the server") as caught:
                call()
            assert "hidden-secret" not in str(caught.value)
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_server_that_never_answers_fails_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(infra.s3_client, "READ_TIMEOUT_S", 1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(64)
        settings = Settings(
            s3_endpoint_url=f"http://127.0.0.1:{mute.getsockname()[1]}", s3_key="key", s3_secret="secret"
        )
        store = open_store("s3://bucket-name/prefix", settings)
        with pytest.raises(StoreUnreachableError, match="no answer"):
            store.read("x")


@pytest.mark.slow
def test_wrong_and_insufficient_credentials_are_told_apart_from_absence(s3_server):
    def opened(key: str, secret: str) -> Store:
        settings = Settings(s3_endpoint_url=s3_server.endpoint_url, s3_key=key, s3_secret=secret)
        return open_store(f"s3://{s3_server.bucket}/credentials", settings)

    opened(s3_server.key, s3_server.secret).create("x", b"1")
    wrong = opened(s3_server.key, "not-the-secret")
    for call in (lambda: wrong.read("x"), lambda: wrong.head("x"), lambda: wrong.list(""), lambda: wrong.folders("")):
        with pytest.raises(StoreAccessError, match="DIFFUSION_BLEND_S3_KEY"):
            call()
    reader = opened(s3_server.reader_key, s3_server.reader_secret)
    assert reader.read("x") == b"1"
    for call in (lambda: reader.create("y", b"2"), reader.probe):
        with pytest.raises(StoreAccessError, match="what they permit"):
            call()


@pytest.mark.slow
def test_a_missing_bucket_is_named(s3_server):
    # An administrator's write makes the bucket, on this server; who may not write is told so first.
    settings = Settings(
        s3_endpoint_url=s3_server.endpoint_url, s3_key=s3_server.reader_key, s3_secret=s3_server.reader_secret
    )
    store = open_store("s3://no-such-bucket/prefix", settings)
    for call in (store.read, store.list, store.folders):
        with pytest.raises(BucketMissingError, match="no-such-bucket"):
            call("x")
