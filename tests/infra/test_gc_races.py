"""Collectors and publishers at the same time: what is committed is whole, at every moment, whoever dies and when."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from stored_blobs import blobs, needed, orphan, orphan_files

import infra.intents
from infra.gc import GRACE, GcReport, collect, collecting
from infra.intents import FOLDER, Steps
from infra.local_store import LocalStore
from infra.manifests import AdapterFacts, AdapterRecord
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

AdapterDir = Callable[..., Path]
TOMORROW = datetime.now(UTC) + timedelta(days=2)
LONG_AGO = time.time() - 2 * 86_400
ROUNDS = 3


def test_a_publish_that_meets_a_collection_at_any_of_its_steps_is_whole(
    tmp_path: Path, adapter_dir: AdapterDir, facts: AdapterFacts, monkeypatch: pytest.MonkeyPatch
):
    """The blobs are there already, as orphans that the collector is about to delete."""
    met, waited, begun = 0, 0, True
    while begun:
        store = open_store(str(tmp_path / f"store-{met}"))
        orphan_files(store, adapter_dir())
        orphan(store, b"cut")
        collector = collecting(store, TOMORROW, GRACE, delete=True)
        begun = all(next(collector, None) is not None for _ in range(met))

        def go_on(_: float, collector: Steps[GcReport] = collector) -> None:
            nonlocal waited
            waited += 1
            next(collector, None)

        monkeypatch.setattr(time, "sleep", go_on)
        Registry(store).publish_adapter("colour", adapter_dir(), facts)
        for _ in collector:
            assert needed(store) <= blobs(store)
        assert blobs(store) == needed(store)
        assert store.list(FOLDER) == []
        met += 1
    assert met > 6
    assert waited > 0


def test_publishers_and_collectors_that_run_at_once_lose_nothing(
    settings: Settings, adapter_dir: AdapterDir, facts: AdapterFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infra.intents, "POLL_S", 0.01)
    directories = [adapter_dir(seed) for seed in range(2)]
    for round_number in range(ROUNDS):
        store = open_store(settings=settings)
        for directory in directories:
            orphan_files(store, directory)

        def publish(writer: int, round_number: int = round_number) -> AdapterRecord:
            registry = Registry(open_store(settings=settings))
            changed = facts.model_copy(update={"seed": round_number})
            return registry.publish_adapter(f"colour{writer}", directories[writer], changed)

        def sweep(_: int) -> GcReport:
            return collect(Registry(open_store(settings=settings)), grace=timedelta(0), delete=True)

        with ThreadPoolExecutor(4) as pool:
            reports, records = pool.map(sweep, range(2)), list(pool.map(publish, range(2)))
            assert all(set(report.removed) <= set(report.orphans) for report in reports)
        for record in records:
            Registry(store).fetch(record, tmp_path / f"{round_number}-{record.name}")
        # the next round begins with these files as orphans again
        for path in store.list(""):
            store.delete(path)


def test_a_publish_interrupted_by_whole_collections_at_any_request_is_never_seen_torn(
    tmp_path: Path, adapter_dir: AdapterDir, facts: AdapterFacts
):
    """Again the blobs lie there as orphans; the publisher is the one that waits at a request."""

    class Interrupted(LocalStore):
        left = -1

        def _at(self, path: str) -> Path:
            self.left -= 1
            if self.left == 0:
                plain = LocalStore(self.root)
                collect(Registry(plain), delete=True)
                assert needed(plain) <= blobs(plain)
            return super()._at(path)

    request, left = 0, 0
    while left <= 0:
        request += 1
        store = Interrupted(tmp_path / f"store-{request}")
        orphan_files(store, adapter_dir())
        for blob in store.list("blobs"):
            os.utime(store.root / blob, (LONG_AGO, LONG_AGO))
        store.left = request
        record = Registry(store).publish_adapter("colour", adapter_dir(), facts)
        left = store.left
        Registry(store).fetch(record, tmp_path / f"fetched-{request}")
    assert request > 15
