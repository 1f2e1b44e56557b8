"""Garbage collection: orphans older than the grace period go, what a manifest names or a publisher holds stays."""

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from stored_blobs import blobs, orphan

import infra.gc
import infra.intents
from infra.blobs import blob_path
from infra.doctor import examine
from infra.errors import IntegrityError, ReadOnlyError, RegistryError, SchemaError, StoreAccessError, StoreError
from infra.gc import GRACE, GcReport, collect, collecting
from infra.intents import FOLDER, HOLDS, INTENTS, Steps, StillHeld, held, holding, run, write_note
from infra.local_store import LocalStore
from infra.manifests import SCHEMA_VERSION, WEIGHTS_FILE, AdapterRecord, seal
from infra.registry import Registry
from infra.s3_store import S3Store
from infra.storage import Listed, open_store

Publish = Callable[..., AdapterRecord]
LONG_AGO = time.time() - 2 * 86_400
TOMORROW = datetime.now(UTC) + timedelta(days=2)


def counts(report: GcReport) -> tuple[int, int, int, int, int, int]:
    """Referenced and young blobs, orphans and their bytes, removed blobs and aborted uploads."""
    orphans, removed = len(report.orphans), len(report.removed)
    return report.referenced, report.young, orphans, report.bytes, removed, report.aborted_uploads


def named(*records: AdapterRecord) -> set[str]:
    return {file.sha256 for record in records for file in record.files}


def test_only_orphans_older_than_the_grace_period_go_and_only_when_asked(
    registry: Registry, publish: Publish, tmp_path: Path
):
    records = [publish(registry, seed) for seed in range(2)]
    registry.publish_bundle("sprites", records[0].base, {"bright": records[0]})
    lost = {orphan(registry.store, data) for data in (b"cut", b"short")}
    kept = named(*records)
    assert counts(collect(registry)) == (len(kept), 2, 0, 0, 0, 0)
    assert counts(collect(registry, delete=True)) == (len(kept), 2, 0, 0, 0, 0)
    assert counts(collect(registry, now=TOMORROW)) == (len(kept), 0, 2, 8, 0, 0)
    assert collect(registry, now=TOMORROW, grace=timedelta(days=5), delete=True).young == 2
    assert blobs(registry.store) == kept | lost
    said: list[str] = []
    assert counts(collect(registry, now=TOMORROW, delete=True, on_progress=said.append)) == (len(kept), 0, 2, 8, 2, 0)
    assert said == ["listing blobs", "reading manifests", "deleting 2 orphans, 0 are gone"]
    assert blobs(registry.store) == kept
    assert registry.store.list(FOLDER) == []
    assert examine(registry) == []
    for record in records:
        registry.fetch(record, tmp_path / record.ref)
    assert collect(registry, now=TOMORROW, delete=True).orphans == ()


def test_more_orphans_than_an_intent_names_go_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(infra.gc, "BATCH", 3)
    store = open_store(str(tmp_path / "store"))
    for number in range(8):
        orphan(store, bytes([number]))
    said: list[str] = []
    assert len(collect(Registry(store), now=TOMORROW, delete=True, on_progress=said.append).removed) == 8
    assert [words for words in said if "deleting" in words] == [
        f"deleting 8 orphans, {gone} are gone" for gone in (0, 3, 6)
    ]
    assert blobs(store) == set()


def test_deleting_stops_when_the_intent_has_grown_old(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    for number in range(8):
        orphan(store, bytes([number]))
    seconds = iter(range(0, 100_000, 30))
    report = run(collecting(store, TOMORROW, GRACE, delete=True, clock=lambda: float(next(seconds))))
    # the clock is read when the intent is written, and then, 30 seconds on, before each blob
    assert (len(report.orphans), len(report.removed)) == (8, infra.intents.STOP_AFTER_S // 30)
    assert len(blobs(store)) == 8 - len(report.removed)
    assert store.list(FOLDER) == []


def test_uploads_left_unfinished_are_aborted_with_the_orphans(registry: Registry, publish: Publish):
    record, store = publish(registry), registry.store
    if isinstance(store, S3Store):
        for number in range(2):
            store._client.call("create_multipart_upload", blob_path(str(number) * 64))
    else:
        assert isinstance(store, LocalStore)
        for number in range(2):
            (store.root / "blobs" / "sha256" / f".unfinished-{number}").write_bytes(b"half")
    assert collect(registry, delete=True, grace=timedelta(0)).aborted_uploads == 0
    assert collect(registry, now=TOMORROW).aborted_uploads == 0
    assert collect(registry, now=TOMORROW, delete=True).aborted_uploads == 2
    assert collect(registry, now=TOMORROW, delete=True).aborted_uploads == 0
    assert blobs(store) == named(record)


def test_what_is_no_blob_is_left_alone(registry: Registry):
    registry.store.create("blobs/README", b"kept by hand")
    registry.store.create("blobs/sha256/notes.txt", b"likewise")
    assert counts(collect(registry, now=TOMORROW, delete=True)) == (0, 0, 0, 0, 0, 0)
    assert len(registry.store.list("blobs")) == 2


@pytest.mark.parametrize("damage", ["lost", "damaged", "newer"])
def test_a_registry_with_an_unreadable_manifest_is_not_collected(tmp_path: Path, publish: Publish, damage: str):
    registry = Registry(open_store(str(tmp_path / "store")))
    for seed in range(3):
        publish(registry, seed)
    orphan(registry.store, b"cut")
    before = blobs(registry.store)
    path = "adapters/colour/versions/000002.json"
    whole = registry.store.read(path)
    registry.store.delete(path)
    if damage == "damaged":
        registry.store.create(path, whole[:-20])
    if damage == "newer":
        registry.store.create(path, seal(json.loads(whole) | {"schema_version": SCHEMA_VERSION + 1}))
    error, words = {
        "lost": (IntegrityError, r"000002\.json is missing.*restore it"),
        "damaged": (IntegrityError, r"000002\.json is damaged.*Restore it"),
        "newer": (SchemaError, r"000002\.json has schema version 3.*upgrade"),
    }[damage]
    with pytest.raises(error, match=words):
        collect(registry, now=TOMORROW, delete=True)
    assert blobs(registry.store) == before
    assert registry.store.list(FOLDER) == []


def test_wrong_questions_are_refused(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(ReadOnlyError, match="read-only"):
        collect(Registry(store, read_only=True), delete=True)
    assert counts(collect(Registry(store, read_only=True))) == (0, 0, 0, 0, 0, 0)
    for arguments in ({"grace": timedelta(hours=-1)}, {"now": datetime(2026, 1, 1)}):
        with pytest.raises(RegistryError, match="correct them"):
            collect(Registry(store), **arguments)


def test_a_store_that_lists_late_is_not_collected(tmp_path: Path):
    class Late(LocalStore):
        def listing(self, prefix: str) -> list[Listed]:
            return [listed for listed in super().listing(prefix) if not listed.path.startswith(FOLDER)]

        def list(self, prefix: str) -> list[str]:
            return [path for path in super().list(prefix) if not path.startswith(FOLDER)]

    store = Late(tmp_path)
    digest = orphan(store, b"cut")
    with pytest.raises(StoreError, match="does not list at once"):
        collect(Registry(store), now=TOMORROW, delete=True)
    assert blobs(store) == {digest}


def test_a_store_that_forgets_holds_is_not_published_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Forgetful(LocalStore):
        def list(self, prefix: str) -> list[str]:
            return [path for path in super().list(prefix) if not path.startswith(HOLDS)]

    monkeypatch.setattr(time, "sleep", lambda _: None)
    store = Forgetful(tmp_path)
    with pytest.raises(StoreError, match=r"does not keep, or does not list.*publish again"):
        held(store, ["ab" * 32], lambda _: pytest.fail("nothing may be published"))
    assert LocalStore(tmp_path).list(FOLDER) == []


def test_a_hold_protects_its_blobs_until_its_publisher_must_have_died(registry: Registry):
    store = registry.store
    digest = orphan(store, b"being published")
    hold = write_note(store, HOLDS, [digest])
    for delete in (False, True):
        assert counts(collect(registry, now=TOMORROW, delete=delete)) == (0, 1, 0, 0, 0, 0)
    assert (blobs(store), store.list(HOLDS)) == ({digest}, [hold])


def test_a_dead_publishers_hold_is_removed_and_its_blobs_go(tmp_path: Path):
    store = LocalStore(tmp_path)
    orphan(store, b"held")
    hold = store.root / write_note(store, HOLDS, blobs(store))
    os.utime(hold, (LONG_AGO, LONG_AGO))
    assert counts(collect(Registry(store), now=TOMORROW)) == (0, 0, 1, 4, 0, 0)
    assert hold.exists()
    assert counts(collect(Registry(store), now=TOMORROW, delete=True)) == (0, 0, 1, 4, 1, 0)
    assert store.list(FOLDER) == []


def test_a_collectors_clock_that_is_wrong_neither_removes_young_blobs_nor_aborts_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(days=400)

    store = LocalStore(tmp_path)
    orphan(store, b"young")
    (store.root / "blobs" / ".unfinished-1").write_bytes(b"half")
    monkeypatch.setattr(infra.gc, "datetime", Ahead)
    assert counts(collect(Registry(store), delete=True)) == (0, 1, 0, 0, 0, 0)


def test_holds_that_may_not_be_looked_at_stop_the_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where publishers and collectors are different users; whoever runs the tests may look everywhere."""
    store = LocalStore(tmp_path)
    write_note(store, HOLDS, [orphan(store, b"being published")])
    scandir = os.scandir

    def deny(path: str | os.PathLike[str]) -> object:
        if str(path).endswith(HOLDS):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(StoreAccessError, match="Permission denied"):
        collect(Registry(store), now=TOMORROW, delete=True)
    assert len(blobs(store)) == 1


def test_a_damaged_note_stops_collectors_and_delays_publishers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = LocalStore(tmp_path)
    orphan(store, b"cut")
    store.create(f"{HOLDS}/x.json", b"{")
    with pytest.raises(IntegrityError, match=r"holds/x\.json is damaged: delete it"):
        collect(Registry(store), now=TOMORROW, delete=True)
    store.create(f"{INTENTS}/x.json", b"[]")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(infra.intents, "PATIENCE_S", 0.0)
    assert held(store, ["ab" * 32], lambda _: "published") == "published"
    assert len(waits) == 1
    assert store.list(INTENTS) == []


def test_a_flipped_hash_in_a_hold_stops_collectors(tmp_path: Path):
    store = LocalStore(tmp_path)
    digest = orphan(store, b"being published")
    hold = store.root / write_note(store, HOLDS, [digest])
    hold.write_bytes(hold.read_bytes().replace(digest[:4].encode(), b"0000"))
    with pytest.raises(IntegrityError, match=r"holds/.*\.json is damaged"):
        collect(Registry(store), now=TOMORROW, delete=True)
    assert blobs(store) == {digest}


def test_a_dead_collectors_intent_is_outlasted_by_publishers_it_concerns_and_by_collectors(tmp_path: Path):
    store = LocalStore(tmp_path)
    now = [0.0]

    def seconds(steps: Steps[object]) -> float:
        """How long these steps wait."""
        begun = now[0]
        for pause in steps:
            now[0] += pause
        return now[0] - begun

    def nothing(_: StillHeld) -> Steps[None]:
        yield 0.0

    mine, others = frozenset(["ab" * 32]), frozenset(["cd" * 32])
    intent = write_note(store, INTENTS, mine)
    assert seconds(holding(store, others, nothing, lambda: now[0])) == 0
    assert store.list(INTENTS) == [intent]
    assert seconds(holding(store, mine, nothing, lambda: now[0])) >= infra.intents.PATIENCE_S
    assert store.list(FOLDER) == []
    write_note(store, INTENTS, mine)
    assert seconds(collecting(store, TOMORROW, GRACE, delete=False, clock=lambda: now[0])) == 0
    assert seconds(collecting(store, TOMORROW, GRACE, delete=True, clock=lambda: now[0])) >= infra.intents.PATIENCE_S
    assert store.list(FOLDER) == []
    assert infra.intents.PATIENCE_S > infra.intents.STOP_AFTER_S + 60


def test_a_publish_that_fails_lets_go_of_its_blobs_unless_it_may_have_happened(tmp_path: Path):
    store = LocalStore(tmp_path)
    for error, left in ((IntegrityError("damaged"), 0), (StoreError("no reply"), 1)):

        def fail(_: StillHeld, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            held(store, ["ab" * 32], fail)
        assert len(store.list(HOLDS)) == left


def test_a_publisher_whose_hold_may_be_taken_for_a_dead_ones_does_not_commit(
    tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infra.intents, "HOLD_LIFETIME", timedelta(seconds=-1))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    registry = Registry(LocalStore(tmp_path / "store"))
    with pytest.raises(StoreError, match="tries took longer than"):
        publish(registry)
    assert registry.names("adapter") == registry.store.list(FOLDER) == []


def test_publishing_again_brings_back_lost_blobs(registry: Registry, publish: Publish, tmp_path: Path):
    record = publish(registry)
    [weights] = [file.sha256 for file in record.files if file.path == WEIGHTS_FILE]
    registry.store.delete(blob_path(weights))
    assert publish(registry) == record
    registry.fetch(record, tmp_path / "fetched")
