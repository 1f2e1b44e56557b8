"""Files to and from stores of either kind: whole, told in bytes, refused when they are not what was hashed."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.artifact_files import sha256_of
from infra.blobs import blob_path, put_blob
from infra.errors import IntegrityError, ObjectExistsError
from infra.s3_client import deadline
from infra.s3_transfers import SINGLE_BYTES
from infra.storage import Store, open_store

MIB = 1 << 20
LARGE = SINGLE_BYTES + 5 * MIB + 7


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """Of three parts, the last one short."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(LARGE))
    return path


@pytest.mark.parametrize("size", [0, 1, 1000, SINGLE_BYTES, SINGLE_BYTES + 1])
def test_files_of_any_size_come_back_as_they_went(store: Store, tmp_path: Path, size: int):
    (tmp_path / "source").write_bytes(os.urandom(size))
    moved: list[int] = []
    store.on_bytes = moved.append
    store.upload("folder/object", tmp_path / "source", sha256=sha256_of(tmp_path / "source"))
    assert sum(moved) == size
    moved.clear()
    store.download("folder/object", tmp_path / "target")
    assert sum(moved) == size
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert [(entry.path, entry.size) for entry in store.listing("")] == [("folder/object", size)]


def test_a_listing_tells_size_and_age_of_what_is_there(store: Store):
    before = datetime.now(UTC) - timedelta(seconds=2)
    store.create("a/b/one", b"12")
    store.create("a/two", b"123")
    store.create("ab", b"")
    listed = store.listing("a")
    assert [(entry.path, entry.size) for entry in listed] == [("a/b/one", 2), ("a/two", 3)]
    assert all(before <= entry.modified <= datetime.now(UTC) + timedelta(seconds=2) for entry in listed)
    assert [entry.path for entry in store.listing("")] == store.list("") == ["a/b/one", "a/two", "ab"]
    assert store.listing("nothing") == []


def test_an_upload_of_another_file_is_refused_and_of_the_same_is_done(store: Store, large_file: Path, tmp_path: Path):
    store.upload("x", large_file)
    store.upload("x", large_file)
    other = tmp_path / "other"
    other.write_bytes(large_file.read_bytes()[:-1] + b"?")
    for same_size in (True, False):
        with pytest.raises(ObjectExistsError, match="exists already"):
            store.upload("x", other)
        if same_size:
            other.write_bytes(b"small")
    store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large_file.read_bytes()
    assert store.abort_uploads(datetime.now(UTC) + timedelta(minutes=1)) == 0


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_file_that_changed_since_it_was_hashed_is_not_stored(store: Store, tmp_path: Path, size: int):
    source = tmp_path / "source"
    source.write_bytes(b"a" * size)
    sha256 = sha256_of(source)
    source.write_bytes(b"b" * size)
    with pytest.raises(IntegrityError, match="changed since"):
        put_blob(store, sha256, source)
    assert store.list("") == []
    source.write_bytes(b"a" * size)
    put_blob(store, sha256, source)
    put_blob(store, sha256, source)
    store.delete(blob_path(sha256))
    store.create(blob_path(sha256), b"rotten")
    with pytest.raises(IntegrityError, match="is damaged"):
        put_blob(store, sha256, source)


def test_unfinished_files_of_a_directory_are_removed_when_old(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.create("folder/object", b"1")
    (tmp_path / "folder" / ".unfinished-0").write_bytes(b"half")
    assert store.abort_uploads(datetime.now(UTC) - timedelta(days=1)) == 0
    assert store.abort_uploads(datetime.now(UTC) + timedelta(minutes=1)) == 1
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["object"]


def test_the_slowest_line_sets_the_deadline():
    assert deadline(0) < deadline(10 * MIB) < deadline(100 * MIB)
