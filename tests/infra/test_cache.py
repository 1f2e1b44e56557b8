"""The local cache: shared by processes, bounded, read without the store, and never trusted."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import infra.cache
from infra.artifact_files import matches, sha256_of
from infra.blobs import blob_path
from infra.cache import Cache
from infra.errors import IntegrityError, RegistryError, StoreUnreachableError
from infra.local_store import LocalStore
from infra.locks import leases, locked
from infra.manifests import WEIGHTS_FILE, AdapterRecord, BundleRecord
from infra.registry import Registry
from infra.storage import open_store

Publish = Callable[..., AdapterRecord]


class Counting(LocalStore):
    """A real store that counts its downloads, and can be away."""

    away = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def read(self, path: str) -> bytes:
        self._note(path)
        return super().read(path)

    def download(self, path: str, target: Path) -> None:
        self._note(path)
        super().download(path, target)

    def _note(self, path: str) -> None:
        if self.away:
            raise StoreUnreachableError(f"{path}: away")
        self.asked.append(path)


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_leases() -> Iterator[None]:
    """Each test is a process of its own in this respect."""
    release_all()
    yield
    release_all()


def release_all() -> None:
    while leases:
        os.close(leases.popitem()[1])


def size_of(directory: Path) -> int:
    return sum({path.stat().st_ino: path.stat().st_size for path in directory.rglob("*") if path.is_file()}.values())


def test_each_blob_is_fetched_once_and_shared(counting: Counting, cache: Cache, publish: Publish):
    records = [publish(Registry(counting), seed) for seed in (0, 1)]
    counting.asked.clear()
    directories = cache.adapters(counting, records)
    assert sorted(counting.asked) == sorted({blob_path(file.sha256) for record in records for file in record.files})
    counting.asked.clear()
    assert cache.adapters(counting, records) == directories
    assert Cache(cache.directory).adapters(counting, [records[1]]) == directories[1:]
    assert counting.asked == []
    for record, directory in zip(records, directories, strict=True):
        assert sorted(path.name for path in directory.iterdir()) == sorted(file.path for file in record.files)
        assert all(matches(directory / file.path, file) for file in record.files)
    weights = next(file for file in records[0].files if file.path == WEIGHTS_FILE)
    assert os.path.samefile(directories[0] / WEIGHTS_FILE, cache.directory / "blobs" / weights.sha256)


def test_damage_anywhere_in_the_cache_is_healed_in_place(counting: Counting, cache: Cache, publish: Publish):
    record = publish(Registry(counting))
    (directory,) = cache.adapters(counting, [record])
    for damage in (
        lambda path: path.write_bytes(b"rotten"),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
    ):
        damage(directory / WEIGHTS_FILE)
        assert cache.adapters(counting, [record]) == [directory]
        assert all(matches(directory / file.path, file) for file in record.files)
    counting.delete(blob_path(next(file.sha256 for file in record.files if file.path == WEIGHTS_FILE)))
    (directory / WEIGHTS_FILE).write_bytes(b"rotten")
    with pytest.raises(IntegrityError, match="is lost"):
        cache.adapters(counting, [record])


def test_the_least_recently_used_go_and_those_in_use_stay(counting: Counting, cache: Cache, publish: Publish):
    records = [publish(Registry(counting), seed) for seed in range(4)]
    one = None
    for age, record in enumerate(records):
        (directory,) = cache.adapters(counting, [record])
        one = one or size_of(cache.directory)
        os.utime(directory, (age, age))
    in_use, recent = records[0], records[3]
    release_all()
    # another process uses the oldest
    script = (
        "import sys, pathlib, infra.locks as c\n"
        "c.lease(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    directory = cache.directory / "adapters" / in_use.digest
    with subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "held\n"
        small = Cache(cache.directory, max_bytes=int(2.5 * one))
        small.trim()
        assert {path.name for path in (cache.directory / "adapters").iterdir()} == {in_use.digest, recent.digest}
        assert size_of(cache.directory) <= small.max_bytes
        user.communicate("")
    tiny = Cache(cache.directory, max_bytes=1)
    tiny.trim()
    assert size_of(cache.directory) == 0
    # what was trimmed away comes back, and stays though it is more than is allowed
    (directory,) = tiny.adapters(counting, [recent])
    assert all(matches(directory / file.path, file) for file in recent.files)
    tiny.trim()
    assert directory.is_dir()
    # a cache may be deleted at any time: what comes back is in use like what was there before
    shutil.rmtree(cache.directory)
    (again,) = tiny.adapters(counting, [recent])
    tiny.trim()
    assert again == directory
    assert directory.is_dir()


def test_leftovers_of_killed_downloads_go(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    (cache.directory / "blobs").mkdir(parents=True)
    cut = cache.directory / "blobs" / f".{1:064x}"
    cut.write_bytes(b"half")
    cache.trim()
    assert cut.exists()
    monkeypatch.setattr(infra.cache, "FRESH_S", -1.0)
    with locked(cut, os.O_RDWR):
        cache.trim()
        assert cut.exists()
    cache.trim()
    assert not cut.exists()


def test_threads_that_want_the_same_adapter_fetch_it_once(counting: Counting, cache: Cache, publish: Publish):
    record = publish(Registry(counting))
    counting.asked.clear()
    barrier = threading.Barrier(8)

    def fetch(_: int) -> list[Path]:
        barrier.wait()
        return cache.adapters(counting, [record])

    with ThreadPoolExecutor(8) as pool:
        (directory,) = {path for paths in pool.map(fetch, range(8)) for path in paths}
    assert sorted(counting.asked) == sorted({blob_path(file.sha256) for file in record.files})
    assert all(matches(directory / file.path, file) for file in record.files)


def churn(store: Path, directory: Path, limit: int, digests: list[str], seed: int) -> int:
    """What one of several processes does: use adapters in its own order, in a cache too small for all of them."""
    import random

    registry = Registry(open_store(str(store)))
    records = registry.versions("colour", "adapter")
    assert [record.digest for record in records] == digests
    order = random.Random(seed)
    used = 0
    for _ in range(40):
        (record,) = order.sample(records, 1)
        (path,) = Cache(directory, limit).adapters(registry.store, [record])
        for file in record.files:
            # nothing in use goes away or changes
            assert sha256_of(path / file.path) == file.sha256
            used += 1
        release_all()
    return used


@pytest.mark.slow
def test_processes_share_a_cache_that_is_too_small(counting: Counting, cache: Cache, publish: Publish):
    records = [publish(Registry(counting), seed) for seed in range(4)]
    cache.adapters(counting, records[:1])
    limit = int(1.5 * size_of(cache.directory))
    release_all()
    digests = [record.digest for record in records]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        jobs = [(counting.root, cache.directory, limit, digests, seed) for seed in range(4)]
        assert pool.starmap(churn, jobs) == [80] * 4
    Cache(cache.directory, limit).trim()
    assert size_of(cache.directory) <= limit
    assert [path for path in cache.directory.rglob(".*") if path.name != ".trim"] == []


def test_without_the_store_what_was_loaded_before_is_known(
    counting: Counting, cache: Cache, publish: Publish, caplog: pytest.LogCaptureFixture
):
    registry = Registry(counting, cache=cache)
    adapter = publish(registry)
    registry.publish_bundle("sprites", adapter.base, {"bright": adapter})
    registry.promote("sprites", 1, actor="test", reason="first")

    def load() -> tuple[BundleRecord, list[Path]]:
        record = cache.last_known("sprites@champion", BundleRecord, lambda: registry.get("sprites@champion"))
        return record, cache.adapters(counting, list(registry.adapters_of(record).values()))

    loaded = load()
    counting.asked.clear()
    assert load() == loaded
    # warm: the alias alone
    assert counting.asked == ["bundles/sprites/aliases/champion.json"]
    counting.away = True
    assert load() == loaded
    assert "away; going on with sprites@1" in caplog.text
    with pytest.raises(StoreUnreachableError):
        cache.last_known("other@champion", BundleRecord, lambda: registry.get("other@champion"))
    manifest = cache.directory / "manifests" / f"{loaded[0].digest}.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"first", b"other").replace(b"sprites", b"spritez"))
    with pytest.raises(StoreUnreachableError):
        load()
    counting.away = False
    assert load() == loaded


def test_a_cache_that_cannot_be_written_says_so(counting: Counting, publish: Publish, tmp_path: Path):
    record = publish(Registry(counting))
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"cannot be used: .*file.*DIFFUSION_BLEND_CACHE_DIR"):
        Cache(tmp_path / "file").adapters(counting, [record])
