"""Collectors and publishers at the same time: what is committed is whole, at every moment, whoever dies and when."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import infra.intents
from infra.blobs import blob_path, put_blob
from infra.errors import ObjectExistsError, ObjectMissingError, StoreError
from infra.gc import GRACE, GcReport, collect, collecting
from infra.intents import FOLDER, Steps, holding
from infra.local_store import LocalStore
from infra.manifests import AdapterFacts, AdapterRecord, BaseIdentity, FileEntry, content_sha256, seal
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import Listed, Store, open_store
from infra.versions import VersionLog

AdapterDir = Callable[..., Path]
TOMORROW = datetime.now(UTC) + timedelta(days=2)
ROUNDS = 3
EXAMPLES = 100
STEPS = 40


def orphan(store: Store, data: bytes) -> str:
    """A blob that no manifest names, as an upload leaves it that was cut short; returns its hash."""
    digest = sha256(data).hexdigest()
    put_blob(store, digest, data)
    return digest


def orphan_files(store: Store, directory: Path) -> None:
    for file in directory.iterdir():
        orphan(store, file.read_bytes())


def blobs(store: Store) -> set[str]:
    return {path.rsplit("/", 1)[-1] for path in store.list("blobs")}


def needed(store: Store) -> set[str]:
    """What the manifests name that can be seen."""
    manifests = (json.loads(store.read(path)) for path in store.list("adapters") if "/versions/" in path)
    return {file["sha256"] for manifest in manifests for file in manifest["files"]}


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
            assert all(report.removed <= report.orphans for report in reports)
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
                collect(Registry(plain), now=TOMORROW, delete=True)
                assert needed(plain) <= blobs(plain)
            return super()._at(path)

    request, left = 0, 0
    while left <= 0:
        request += 1
        store = Interrupted(tmp_path / f"store-{request}")
        orphan_files(store, adapter_dir())
        store.left = request
        record = Registry(store).publish_adapter("colour", adapter_dir(), facts)
        left = store.left
        Registry(store).fetch(record, tmp_path / f"fetched-{request}")
    assert request > 20


class ModelStore(Store):
    """A store in memory whose stamps are of a clock that the test sets."""

    url = "memory://"

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.objects: dict[str, tuple[bytes, datetime]] = {}

    def read(self, path: str) -> bytes:
        if path not in self.objects:
            raise ObjectMissingError(path)
        return self.objects[path][0]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        return self.read(path), sha256(self.read(path)).hexdigest()

    def create(self, path: str, data: bytes) -> None:
        if self.objects.setdefault(path, (data, self.now))[0] != data:
            raise ObjectExistsError(path)

    def replace(self, path: str, data: bytes, etag: str) -> None:
        assert self.head(path) == etag, "steps are not interleaved within a compare-and-swap"
        self.objects[path] = (data, self.now)

    def head(self, path: str) -> str | None:
        return self.read_tagged(path)[1] if path in self.objects else None

    def folders(self, prefix: str) -> list[str]:
        skip = len(prefix) + 1
        return sorted({path[skip:].split("/")[0] for path in self.objects if path.startswith(f"{prefix}/")})

    def listing(self, prefix: str) -> list[Listed]:
        found = sorted(path for path in self.objects if path.startswith(f"{prefix}/"))
        return [Listed(path, len(self.objects[path][0]), self.objects[path][1]) for path in found]

    def list(self, prefix: str) -> list[str]:
        return [listed.path for listed in self.listing(prefix)]

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)

    def abort_uploads(self, before: datetime) -> int:
        return 0

    def upload(self, path: str, source: Path) -> None:
        raise NotImplementedError

    download = upload


DATA = tuple(bytes([65 + number]) for number in range(3))
FACTS = AdapterFacts(
    base=BaseIdentity(source="sprites", sha256="ab" * 32),
    rank=2,
    alpha=2.0,
    target_modules=("to_q",),
    reward="colourfulness",
    reward_version="1",
    kl_weight=0.1,
    seed=0,
)


def publishing(store: Store, data: frozenset[bytes], clock: Callable[[], float]) -> Steps[AdapterRecord]:
    """What Registry.publish_adapter does, taken apart into steps: content `data`, one file for each of its bytes."""
    files = [FileEntry(path=one.decode(), size=1, sha256=sha256(one).hexdigest()) for one in sorted(data)]
    fields = FACTS.model_dump(mode="json") | {"kind": "adapter", "files": [file.model_dump() for file in files]}
    content = content_sha256(fields)
    fields |= {"schema_version": 1, "name": "colour", "content_sha256": content, "nonce": "", "created_at": 0}
    log = VersionLog(store, AdapterRecord, "adapters/colour")

    def work() -> Steps[AdapterRecord]:
        published = log.find(content)
        for one in sorted(data):
            yield 0.0
            there = store.head(blob_path(sha256(one).hexdigest())) is not None
            yield 0.0
            if not there:
                orphan(store, one)
        yield 0.0
        return published or log.commit(content, lambda version: seal(fields | {"version": version}))

    return holding(store, frozenset(file.sha256 for file in files), work, clock)


class Machine(RuleBasedStateMachine):
    """Steps of publishers and collectors in any order, some of which die, and the promises that they made.

    The collectors' clocks are wrong by days. With `jumping`, the store's clock is too, from one moment to the next:
    what a publish returned must be there all the same, while before that it may be seen torn.
    """

    def __init__(self, jumping: bool) -> None:
        super().__init__()
        self.jumping = jumping
        self.store = ModelStore()
        self.seconds = 0.0
        self.publishers: dict[Steps[AdapterRecord], set[str]] = {}
        self.collectors: list[Steps[GcReport]] = []
        self.promised: set[str] = set()

    @initialize(data=st.frozensets(st.sampled_from(DATA)))
    def uploads_were_cut_short(self, data: frozenset[bytes]) -> None:
        for one in data:
            orphan(self.store, one)

    @precondition(lambda self: len(self.publishers) < 3)
    @rule(data=st.frozensets(st.sampled_from(DATA), min_size=1, max_size=2))
    def publish(self, data: frozenset[bytes]) -> None:
        steps = publishing(self.store, data, lambda: self.seconds)
        self.publishers[steps] = {sha256(one).hexdigest() for one in data}

    @precondition(lambda self: len(self.collectors) < 3)
    @rule(ahead=st.sampled_from([0, 3, 400]))
    def collect(self, ahead: int) -> None:
        now = self.store.now + timedelta(days=ahead)
        self.collectors.append(collecting(self.store, now, GRACE, delete=True, clock=lambda: self.seconds))

    @precondition(lambda self: self.publishers)
    @rule(which=st.integers(0, 2), count=st.integers(1, 12))
    def a_publisher_goes_on(self, which: int, count: int) -> None:
        for _ in range(count):
            self.step(list(self.publishers)[which % len(self.publishers)] if self.publishers else None)

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 2), count=st.integers(1, 12))
    def a_collector_goes_on(self, which: int, count: int) -> None:
        for _ in range(count):
            self.step(self.collectors[which % len(self.collectors)] if self.collectors else None)

    @precondition(lambda self: self.publishers)
    @rule(which=st.integers(0, 2))
    def a_publisher_dies(self, which: int) -> None:
        del self.publishers[list(self.publishers)[which % len(self.publishers)]]

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 2))
    def a_collector_dies(self, which: int) -> None:
        del self.collectors[which % len(self.collectors)]

    @rule(seconds=st.sampled_from([1, 130, 310, 1000]))
    def time_goes_by(self, seconds: float) -> None:
        self.seconds += seconds
        self.store.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.jumping)
    @rule(days=st.sampled_from([-400, -2, 2, 400]))
    def the_stores_clock_jumps(self, days: int) -> None:
        self.store.now += timedelta(days=days)

    def step(self, steps: Steps[AdapterRecord] | Steps[GcReport] | None) -> None:
        if steps is None:
            return
        try:
            next(steps)
            self.nothing_promised_is_lost()
            return
        except StopIteration:
            self.promised |= self.publishers.get(steps, set())
        except StoreError:
            assert self.jumping
        self.publishers.pop(steps, None)
        self.collectors = [other for other in self.collectors if other is not steps]

    @invariant()
    def nothing_promised_is_lost(self) -> None:
        assert self.promised <= needed(self.store)
        assert (self.promised if self.jumping else needed(self.store)) <= blobs(self.store)

    def everyone_finishes(self) -> None:
        for _ in range(1000):
            for steps in (*self.publishers, *self.collectors):
                self.step(steps)
            self.time_goes_by(5)
            if not self.publishers and not self.collectors:
                break
        assert not self.publishers
        assert not self.collectors

    def teardown(self) -> None:
        """Nobody waits for ever. Then holds are found to be of the dead, and what they held goes."""
        self.everyone_finishes()
        for _ in range(2):
            self.store.now += timedelta(days=500)
            self.collect(0)
            self.everyone_finishes()
        assert self.promised <= blobs(self.store)
        assert blobs(self.store) <= needed(self.store)
        assert self.store.list(FOLDER) == []


@pytest.mark.parametrize("jumping", [False, True])
def test_whoever_dies_and_whatever_clocks_say_nothing_is_lost_and_orphans_go(jumping: bool):
    run_state_machine_as_test(
        lambda: Machine(jumping), settings=hypothesis_settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
    )
