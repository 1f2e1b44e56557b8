"""A registry whose store fails: requests lost, replies lost, connections cut. Every publish lands exactly once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import COLLISION, FAULTS, FaultProxy, Request
from safetensors.numpy import save_file

from infra.doctor import examine
from infra.errors import IntegrityError, StoreError, StoreUnreachableError
from infra.manifests import WEIGHTS_FILE, AdapterFacts, AdapterRecord
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import Store

Publish = Callable[..., AdapterRecord]
Matches = Callable[[Request], bool]

on_s3 = pytest.mark.parametrize("settings", [pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
# tests/bench/registry.py does 500
LOCAL_OPERATIONS, S3_OPERATIONS = 60, 15
RATE = 0.1
LARGE = 21 << 20


def write(part: str) -> Matches:
    """Requests that write an object with this in its path."""
    return lambda request: request.method in ("PUT", "POST") and part in request.path


def read(part: str) -> Matches:
    return lambda request: request.method == "GET" and part in request.path


# What a publish and the second move of an alias write.
WRITES = ("/gc/holds/", "/blobs/", "/contents/", "/versions/", "/champion/", "/champion.json")


@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_every_operation_counts_once_while_a_tenth_of_all_calls_of_a_local_store_fail(
    store: Store, parts, tmp_path: Path
):
    module = parts("faulty_store")
    share = module.Share(RATE)
    faulty = Registry(module.FaultyStore(store, share))
    outcome = parts("faults").operate(faulty, Registry(store), tmp_path / "work", LOCAL_OPERATIONS)
    assert (outcome.wrong, outcome.lost, outcome.duplicated) == ([], 0, 0)
    assert outcome.operations == LOCAL_OPERATIONS
    assert min(share.counts["cut"], share.counts["lost"]) >= LOCAL_OPERATIONS // 4


@on_s3
def test_every_operation_counts_once_while_a_tenth_of_all_requests_fail(
    registry: Registry, faulty: Registry, proxy: FaultProxy, parts, tmp_path: Path
):
    proxy.rate = RATE
    outcome = parts("faults").operate(faulty, registry, tmp_path / "work", S3_OPERATIONS)
    assert (outcome.wrong, outcome.lost, outcome.duplicated) == ([], 0, 0)
    assert outcome.operations == S3_OPERATIONS
    # every kind came up, or nearly
    assert len(proxy.counts) >= len(FAULTS) - 2
    assert proxy.injected >= S3_OPERATIONS


@on_s3
@pytest.mark.parametrize("part", WRITES)
def test_a_reply_that_is_lost_after_a_write_is_success_and_no_second_write(
    registry: Registry, faulty: Registry, proxy: FaultProxy, publish: Publish, part: str
):
    publish(registry, 0)
    registry.promote("colour", 1, actor="test", reason="first", kind="adapter")
    rule = proxy.inject("swallow", write(part))
    assert publish(faulty, 1).version == 2
    entry = faulty.promote("colour", 2, actor="test", reason="second", kind="adapter")
    assert rule.met >= 1
    assert proxy.injected == 1
    assert [record.seed for record in registry.versions("colour", "adapter")] == [0, 1]
    assert [move.version for move in registry.history("colour", kind="adapter")] == [1, 2]
    assert registry.history("colour", kind="adapter")[-1] == entry
    assert examine(registry) == []


@on_s3
@pytest.mark.parametrize("fault", [*FAULTS, COLLISION])
def test_whatever_happens_to_a_commit_it_takes_place_once(
    registry: Registry, faulty: Registry, proxy: FaultProxy, publish: Publish, fault: str
):
    proxy.inject(fault, write("/versions/"))
    assert publish(faulty).version == 1
    assert proxy.counts == {fault: 1}
    assert publish(faulty, 1).version == 2
    assert [record.seed for record in registry.versions("colour", "adapter")] == [0, 1]
    assert examine(registry) == []


@on_s3
def test_a_commit_of_which_no_reply_ever_comes_is_a_typed_error_and_counts(
    registry: Registry, faulty: Registry, proxy: FaultProxy, publish: Publish
):
    """Its line is dead from the commit on: only the next publisher can tell whether it took place."""
    dead: list[int] = []

    def after_the_commit(request: Request) -> bool:
        if write("/versions/")(request):
            dead.append(request.number)
        return bool(dead)

    rule = proxy.inject("swallow", after_the_commit, times=1_000)
    with pytest.raises(StoreUnreachableError):
        publish(faulty)
    assert rule.met > 1
    proxy.rules.clear()
    visible = registry.versions("colour", "adapter")
    assert len(visible) == 1
    assert publish(faulty) == visible[0]
    assert registry.versions("colour", "adapter") == visible
    assert examine(registry) == []


@on_s3
@pytest.mark.parametrize("fault", ["cut-reply", "swallow", "masked"])
def test_a_download_that_fails_is_the_lines_fault_and_never_called_damage(
    registry: Registry, faulty: Registry, proxy: FaultProxy, publish: Publish, tmp_path: Path, fault: str
):
    """Who is told that a blob is damaged may delete it."""
    record = publish(registry)
    proxy.inject(fault, read("/blobs/"))
    fetched = faulty.fetch(record, tmp_path / "fetched")
    assert sorted(path.name for path in fetched.iterdir()) == sorted(file.path for file in record.files)
    proxy.inject(fault, read("/blobs/"), times=1_000)
    with pytest.raises(StoreError) as caught:
        faulty.fetch(record, tmp_path / "again")
    assert not isinstance(caught.value, IntegrityError)
    assert list(tmp_path.glob("*again*")) == []
    assert (fetched / WEIGHTS_FILE).exists()


@on_s3
def test_large_files_go_up_and_come_down_whole(
    registry: Registry, faulty: Registry, proxy: FaultProxy, facts: AdapterFacts, tmp_path: Path
):
    """Large enough to be sent in parts, each of which meets faults of its own."""
    directory = tmp_path / "large"
    directory.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, size=(64, LARGE // 64), dtype=np.uint8)
    save_file({"unet.block.to_q.lora_A.weight": noise.view(np.float32)}, directory / WEIGHTS_FILE)
    proxy.rate = 2 * RATE
    records = [repeated(lambda: faulty.publish_adapter("colour", directory, facts)) for _ in range(2)]
    fetched = repeated(lambda: faulty.fetch(records[0], tmp_path / "fetched"))
    assert (fetched / WEIGHTS_FILE).read_bytes() == (directory / WEIGHTS_FILE).read_bytes()
    assert registry.versions("colour", "adapter") == [records[0]] == [records[1]]
    assert proxy.injected >= 3
    assert examine(registry) == []


def repeated(operation: Callable[[], Any]) -> Any:
    for _ in range(20):
        try:
            return operation()
        except StoreError:
            continue
    raise AssertionError("failed twenty times in a row")


@on_s3
def test_a_refused_write_whose_reply_is_lost_is_refused_still(
    registry: Registry, faulty: Registry, proxy: FaultProxy, settings: Settings
):
    """The other side of reading back: what stands there is another's."""
    registry.store.create("object", b"theirs")
    etag = registry.store.head("object")
    registry.store.replace("object", b"theirs, later", etag)
    proxy.inject("swallow", write("/object"))
    with pytest.raises(StoreError, match="exists already"):
        faulty.store.create("object", b"mine")
    proxy.inject("swallow", write("/object"))
    with pytest.raises(StoreError, match="has changed"):
        faulty.store.replace("object", b"mine", etag)
    assert registry.store.read("object") == b"theirs, later"
    assert proxy.injected == 2
