"""Publishers and collectors, step by step in any order, against a model: what is committed is whole, whoever dies."""

from collections.abc import Callable
from dataclasses import dataclass
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

EXAMPLES = 300
STEPS = 30
# Longest that a request may be under way whose caller has given up, in seconds.
LATE = 60
DAY = 90_000
DATA = (b"A", b"B")
WHICH = st.integers(0, 3)
# Steps that one takes before others do; the last is to the end, unless that has to be waited for.
COUNTS = st.sampled_from([1, 2, 3, 4, 6, 9, 14, 40])
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


@dataclass(eq=False)
class Actor:
    """A publisher or a collector on its way; `hashes` are the blobs that a publisher is to see stored."""

    steps: Steps[AdapterRecord] | Steps[GcReport]
    hashes: frozenset[str] = frozenset()
    committing: bool = False


def publisher(store: Store, data: frozenset[bytes], clock: Callable[[], float]) -> Actor:
    """What Registry.publish_adapter does, taken apart into steps: content `data`, one file for each of its bytes."""
    files = [FileEntry(path=one.decode(), size=1, sha256=sha256(one).hexdigest()) for one in sorted(data)]
    fields = FACTS.model_dump(mode="json") | {"kind": "adapter", "files": [file.model_dump() for file in files]}
    content = content_sha256(fields)
    fields |= {"schema_version": 1, "name": "colour", "content_sha256": content, "nonce": "", "created_at": 0}
    log = VersionLog(store, AdapterRecord, "adapters/colour")

    def work(still_held: StillHeld) -> Steps[AdapterRecord]:
        published = log.find(content)
        for one in sorted(data):
            yield 0.0
            there = store.head(blob_path(sha256(one).hexdigest())) is not None
            yield 0.0
            if not there:
                orphan(store, one)
        yield 0.0
        still_held()
        actor.committing = True
        yield 0.0
        record = published or log.commit(content, lambda version: seal(fields | {"version": version}))
        actor.committing = False
        return record

    hashes = frozenset(file.sha256 for file in files)
    actor = Actor(holding(store, hashes, work, clock), hashes)
    return actor


class Machine(RuleBasedStateMachine):
    """Steps of publishers and collectors, some of which die or get no answer, and the promises that they made.

    The collectors' clocks are wrong by days. With `jumping`, the store's clock is too, from one moment to the next:
    what a publish returned must be there all the same, while before that it may be seen torn.
    """

    def __init__(self, jumping: bool) -> None:
        super().__init__()
        self.jumping = jumping
        self.store = ModelStore()
        self.seconds = self.since_arrivals = 0.0
        self.actors: list[Actor] = []
        self.promised: set[str] = set()

    @initialize(data=st.frozensets(st.sampled_from(DATA), min_size=1))
    def uploads_were_cut_short_long_ago(self, data: frozenset[bytes]) -> None:
        for one in data:
            orphan(self.store, one)
        self.time_goes_by(2 * DAY)

    @precondition(lambda self: len(self.actors) < 4)
    @rule(data=st.frozensets(st.sampled_from(DATA), min_size=1), count=COUNTS)
    def publish(self, data: frozenset[bytes], count: int) -> None:
        self.actors.append(publisher(self.store, data, lambda: self.seconds))
        self.one_goes_on(-1, count)

    @precondition(lambda self: len(self.actors) < 4)
    @rule(ahead=st.sampled_from([None, 0, 3, 400]), count=COUNTS)
    def collect(self, ahead: int | None, count: int) -> None:
        now = None if ahead is None else self.store.now + timedelta(days=ahead)
        self.actors.append(Actor(collecting(self.store, now, GRACE, delete=True, clock=lambda: self.seconds)))
        self.one_goes_on(-1, count)

    @precondition(lambda self: self.actors)
    @rule(which=WHICH, count=COUNTS)
    def one_goes_on(self, which: int, count: int) -> None:
        actor = self.actors[which % len(self.actors)]
        while count and actor in self.actors:
            self.step(actor)
            count -= 1

    @precondition(lambda self: self.actors)
    @rule(which=WHICH)
    def one_dies(self, which: int) -> None:
        del self.actors[which % len(self.actors)]

    @precondition(lambda self: self.actors)
    @rule(which=WHICH)
    def one_gets_no_answer(self, which: int) -> None:
        """To the first write, within its next steps."""
        self.store.losing = True
        actor = self.actors[which % len(self.actors)]
        for _ in range(20):
            if actor in self.actors and self.store.losing:
                self.step(actor)
        self.store.losing = False

    @rule(seconds=st.sampled_from([130, 310, DAY]))
    def time_goes_by(self, seconds: float) -> None:
        # A publisher is not given a day between its last look at its watch and its commit.
        if seconds >= DAY and any(actor.committing for actor in self.actors) and not self.jumping:
            return
        self.since_arrivals += seconds
        if self.since_arrivals >= LATE:
            self.store.arrive()
            self.since_arrivals = 0.0
        self.seconds += seconds
        self.store.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.jumping)
    @rule(days=st.sampled_from([-400, -2, 2, 400]))
    def the_stores_clock_jumps(self, days: int) -> None:
        self.store.now += timedelta(days=days)

    def step(self, actor: Actor) -> None:
        try:
            next(actor.steps)
        except StopIteration:
            self.promised |= actor.hashes
            self.actors.remove(actor)
        except StoreError:
            self.actors.remove(actor)
        self.nothing_committed_is_lost()

    @invariant()
    def nothing_committed_is_lost(self) -> None:
        assert self.promised <= needed(self.store)
        assert (self.promised if self.jumping else needed(self.store)) <= blobs(self.store)

    def everyone_finishes(self) -> None:
        for _ in range(1000):
            for actor in tuple(self.actors):
                self.step(actor)
            self.time_goes_by(5)
            if not self.actors:
                break
        assert not self.actors

    def teardown(self) -> None:
        """Nobody waits for ever. Then one collection goes by without faults, and leaves nothing that is not needed."""
        self.everyone_finishes()
        self.time_goes_by(2 * DAY)
        self.store.now += timedelta(days=20_000)
        self.collect(None, 0)
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
