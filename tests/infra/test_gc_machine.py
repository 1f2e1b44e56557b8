"""Publishers and collectors, step by step in any order, against a model: what is committed is whole, whoever dies."""

from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256

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
from model_store import ModelStore
from stored_blobs import blobs, needed, orphan

from infra.blobs import blob_path
from infra.errors import StoreError
from infra.gc import GRACE, GcReport, collecting
from infra.intents import FOLDER, Steps, StillHeld, holding
from infra.manifests import AdapterFacts, AdapterRecord, BaseIdentity, FileEntry, content_sha256, seal
from infra.storage import Store
from infra.versions import VersionLog

EXAMPLES = 100
STEPS = 40
# Longest that a request may be under way whose caller has given up, in seconds.
LATE = 60
DAY = 90_000
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


class Publisher:
    """What Registry.publish_adapter does, taken apart into steps: content `data`, one file for each of its bytes."""

    def __init__(self, store: Store, data: frozenset[bytes], clock: Callable[[], float]) -> None:
        self.store = store
        self.data = sorted(data)
        self.hashes = {sha256(one).hexdigest() for one in data}
        self.committing = False
        self.steps = holding(store, frozenset(self.hashes), self._work, clock)

    def _work(self, still_held: StillHeld) -> Steps[AdapterRecord]:
        files = [FileEntry(path=one.decode(), size=1, sha256=sha256(one).hexdigest()) for one in self.data]
        fields = FACTS.model_dump(mode="json") | {"kind": "adapter", "files": [file.model_dump() for file in files]}
        content = content_sha256(fields)
        fields |= {"schema_version": 1, "name": "colour", "content_sha256": content, "nonce": "", "created_at": 0}
        log = VersionLog(self.store, AdapterRecord, "adapters/colour")
        published = log.find(content)
        for one in self.data:
            yield 0.0
            there = self.store.head(blob_path(sha256(one).hexdigest())) is not None
            yield 0.0
            if not there:
                orphan(self.store, one)
        yield 0.0
        still_held()
        self.committing = True
        yield 0.0
        record = published or log.commit(content, lambda version: seal(fields | {"version": version}))
        self.committing = False
        return record


class Machine(RuleBasedStateMachine):
    """Steps of publishers and collectors, some of which die or get no answer, and the promises that they made.

    The collectors' clocks are wrong by days. With `jumping`, the store's clock is too, from one moment to the next:
    what a publish returned must be there all the same, while before that it may be seen torn.
    """

    def __init__(self, jumping: bool) -> None:
        super().__init__()
        self.jumping = jumping
        self.store = ModelStore()
        self.seconds = 0.0
        self.publishers: list[Publisher] = []
        self.collectors: list[Steps[GcReport]] = []
        self.promised: set[str] = set()

    @initialize(data=st.frozensets(st.sampled_from(DATA)))
    def uploads_were_cut_short(self, data: frozenset[bytes]) -> None:
        for one in data:
            orphan(self.store, one)

    @precondition(lambda self: len(self.publishers) < 3)
    @rule(data=st.frozensets(st.sampled_from(DATA), min_size=1, max_size=2))
    def publish(self, data: frozenset[bytes]) -> None:
        self.publishers.append(Publisher(self.store, data, lambda: self.seconds))

    @precondition(lambda self: len(self.collectors) < 3)
    @rule(ahead=st.sampled_from([None, 0, 3, 400]))
    def collect(self, ahead: int | None) -> None:
        now = None if ahead is None else self.store.now + timedelta(days=ahead)
        self.collectors.append(collecting(self.store, now, GRACE, delete=True, clock=lambda: self.seconds))

    @precondition(lambda self: self.publishers)
    @rule(which=st.integers(0, 2), count=st.integers(1, 12))
    def a_publisher_goes_on(self, which: int, count: int) -> None:
        publisher = self.publishers[which % len(self.publishers)]
        while count and publisher in self.publishers:
            self.step_publisher(publisher)
            count -= 1

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 2), count=st.integers(1, 12))
    def a_collector_goes_on(self, which: int, count: int) -> None:
        collector = self.collectors[which % len(self.collectors)]
        while count and collector in self.collectors:
            self.step_collector(collector)
            count -= 1

    @precondition(lambda self: self.publishers)
    @rule(which=st.integers(0, 2))
    def a_publisher_dies(self, which: int) -> None:
        del self.publishers[which % len(self.publishers)]

    @precondition(lambda self: self.collectors)
    @rule(which=st.integers(0, 2))
    def a_collector_dies(self, which: int) -> None:
        del self.collectors[which % len(self.collectors)]

    @rule()
    def the_next_write_gets_no_answer(self) -> None:
        self.store.losing = True

    @rule(seconds=st.sampled_from([1, 130, 310, 1000, DAY]))
    def time_goes_by(self, seconds: float) -> None:
        # A publisher is not given a day between its last look at its watch and its commit.
        if seconds == DAY and any(publisher.committing for publisher in self.publishers) and not self.jumping:
            return
        if seconds >= LATE:
            self.store.arrive()
        self.seconds += seconds
        self.store.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.jumping)
    @rule(days=st.sampled_from([-400, -2, 2, 400]))
    def the_stores_clock_jumps(self, days: int) -> None:
        self.store.now += timedelta(days=days)

    def step_publisher(self, publisher: Publisher) -> None:
        try:
            next(publisher.steps)
        except StopIteration:
            self.promised |= publisher.hashes
            self.publishers.remove(publisher)
        except StoreError:
            self.publishers.remove(publisher)
        self.nothing_committed_is_lost()

    def step_collector(self, collector: Steps[GcReport]) -> None:
        try:
            next(collector)
        except (StopIteration, StoreError):
            self.collectors.remove(collector)
        self.nothing_committed_is_lost()

    @invariant()
    def nothing_committed_is_lost(self) -> None:
        assert self.promised <= needed(self.store)
        assert (self.promised if self.jumping else needed(self.store)) <= blobs(self.store)

    def everyone_finishes(self) -> None:
        for _ in range(1000):
            for publisher in tuple(self.publishers):
                self.step_publisher(publisher)
            for collector in tuple(self.collectors):
                self.step_collector(collector)
            self.time_goes_by(5)
            if not self.publishers and not self.collectors:
                break
        assert not self.publishers
        assert not self.collectors

    def teardown(self) -> None:
        """Nobody waits for ever. Then one collection goes by without faults, and leaves nothing that is not needed."""
        self.store.losing = False
        self.everyone_finishes()
        self.store.arrive()
        self.store.now += timedelta(days=500)
        self.collect(None)
        self.everyone_finishes()
        assert self.promised <= blobs(self.store)
        assert blobs(self.store) <= needed(self.store)
        assert self.store.list(FOLDER) == []


@pytest.mark.parametrize("jumping", [False, True])
def test_whoever_dies_and_whatever_clocks_say_nothing_is_lost_and_orphans_go(jumping: bool):
    run_state_machine_as_test(
        lambda: Machine(jumping),
        settings=hypothesis_settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None),
    )
