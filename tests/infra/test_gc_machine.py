"""Publishers and collectors, step by step in any order, against a model: what is committed is whole, whoever dies."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from itertools import product

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
from infra.intents import FOLDER, PATIENCE_S, STOP_AFTER_S, Steps, StillHeld, holding
from infra.manifests import AdapterFacts, AdapterRecord, BaseIdentity, FileEntry, content_sha256, seal
from infra.storage import Store
from infra.versions import VersionLog

EXAMPLES = 300
STEPS = 12
# Longest that a request may be under way whose caller has given up, in seconds.
LATE = 60
DAY = 90_000
TIMES = (STOP_AFTER_S - 1, PATIENCE_S + 1, DAY)
DATA = (b"A", b"B")
PUBLISHERS = (0, 1)
# Steps of either, if it need not wait.
MOST = 25
SLOTS = st.integers(0, 3)
CONTENTS = st.frozensets(st.sampled_from(DATA), min_size=1)
# Days by which a collector's clock is ahead; None asks the store.
AHEAD = st.sampled_from([None, 0, 3, 400])
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
        self.actors: dict[int, Actor] = {}
        self.promised: set[str] = set()

    @initialize(data=CONTENTS)
    def uploads_were_cut_short_long_ago(self, data: frozenset[bytes]) -> None:
        for one in data:
            orphan(self.store, one)
        self.time_goes_by(2 * DAY)

    @rule(moves=st.lists(st.tuples(SLOTS, COUNTS), min_size=1, max_size=8), data=CONTENTS, ahead=AHEAD)
    def some_go_on(self, moves: list[tuple[int, int]], data: frozenset[bytes], ahead: int | None) -> None:
        """In this order, each by so many steps; who is not there yet begins."""
        for slot, count in moves:
            if slot not in self.actors:
                self.actors[slot] = self.a_publisher(data) if slot in PUBLISHERS else self.a_collector(ahead)
            for _ in range(count):
                self.step(slot)

    @precondition(lambda self: self.actors)
    @rule(slot=SLOTS)
    def one_dies(self, slot: int) -> None:
        self.actors.pop(slot, None)

    @precondition(lambda self: self.actors)
    @rule(slot=SLOTS, writes=st.integers(0, 3))
    def one_gets_no_answer(self, slot: int, writes: int) -> None:
        """After so many writes, should it make them within its next steps."""
        self.store.losing = writes
        for _ in range(20):
            if self.store.losing is not None:
                self.step(slot)
        self.store.losing = None

    @rule(seconds=st.sampled_from(TIMES))
    def time_goes_by(self, seconds: float) -> None:
        # A publisher is not given a day between its last look at its watch and its commit.
        if seconds >= DAY and any(actor.committing for actor in self.actors.values()) and not self.jumping:
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

    def a_publisher(self, data: frozenset[bytes]) -> Actor:
        return publisher(self.store, data, lambda: self.seconds)

    def a_collector(self, ahead: int | None) -> Actor:
        now = None if ahead is None else self.store.now + timedelta(days=ahead)
        return Actor(collecting(self.store, now, GRACE, delete=True, clock=lambda: self.seconds))

    def step(self, slot: int) -> None:
        if slot not in self.actors:
            return
        try:
            next(self.actors[slot].steps)
        except StopIteration:
            self.promised |= self.actors.pop(slot).hashes
        except StoreError:
            del self.actors[slot]
        self.nothing_committed_is_lost()

    @invariant()
    def nothing_committed_is_lost(self) -> None:
        assert self.promised <= needed(self.store)
        assert (self.promised if self.jumping else needed(self.store)) <= blobs(self.store)

    def everyone_finishes(self) -> None:
        for _ in range(1000):
            for slot in tuple(self.actors):
                self.step(slot)
            self.time_goes_by(5)
            if not self.actors:
                break
        assert not self.actors

    def teardown(self) -> None:
        """Nobody waits for ever. Then one collection goes by without faults, and leaves nothing that is not needed."""
        self.everyone_finishes()
        self.time_goes_by(2 * DAY)
        self.store.now += timedelta(days=20_000)
        self.actors = {0: self.a_collector(None)}
        self.everyone_finishes()
        self.nothing_committed_is_lost()
        assert blobs(self.store) <= needed(self.store)
        assert self.store.list(FOLDER) == []


@pytest.mark.parametrize("jumping", [False, True])
def test_whoever_dies_and_whatever_clocks_say_nothing_is_lost_and_orphans_go(jumping: bool):
    run_state_machine_as_test(
        lambda: Machine(jumping),
        settings=hypothesis_settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None),
    )


def meet(machine: Machine, slots: tuple[int, ...], counts: tuple[int, ...], trouble: Callable[[int], None]) -> int:
    """They take turns of so many steps, the last two to their ends; `trouble` is told which turn is next.

    Returns how many turns it took until one had ended before its turn was over: longer turns would be the same.
    """
    machine.uploads_were_cut_short_long_ago(frozenset(DATA[:1]))
    machine.actors = {0: machine.a_publisher(frozenset(DATA[:1])), 1: machine.a_collector(None)}
    full = 0
    for turn, (slot, count) in enumerate(zip(slots, (*counts, MOST, MOST), strict=True)):
        trouble(turn)
        for _ in range(count):
            machine.step(slot)
        full += slot in machine.actors and full == turn
    machine.store.losing = None
    machine.everyone_finishes()
    machine.time_goes_by(LATE)
    machine.nothing_committed_is_lost()
    return full


def orders(turns: int, shorten: dict[tuple[int, ...], int]) -> Iterator[tuple[int, ...]]:
    """Lengths of turns, each to MOST or what `shorten` says of the one that follows such turns."""
    for counts in product(range(MOST), repeat=turns):
        if all(counts[turn] <= shorten.get(counts[:turn], MOST) for turn in range(turns)):
            yield counts


TROUBLE = [(time, None, False) for time in TIMES] + [(DAY, None, True), (0, 0, False), (0, 1, False)]


@pytest.mark.parametrize(("seconds", "writes", "jumping"), TROUBLE)
@pytest.mark.parametrize("slots", [(0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0), (1, 0, 0, 1)])
def test_in_every_order_of_two_that_meet_nothing_is_lost_whatever_happens_at_one_turn(
    slots: tuple[int, ...], seconds: float, writes: int | None, jumping: bool
):
    for when in (1, 2):
        shorten: dict[tuple[int, ...], int] = {}
        for counts in orders(2, shorten):
            machine = Machine(jumping)

            def trouble(turn: int, machine: Machine = machine, when: int = when) -> None:
                if turn == when:
                    machine.time_goes_by(seconds)
                    machine.store.losing = writes

            full = meet(machine, slots, counts, trouble)
            if full < len(counts):
                shorten[counts[:full]] = counts[full]
        assert len(shorten) > 2


@pytest.mark.parametrize("slots", [(0, 1, 0, 1, 0), (1, 0, 1, 0, 1)])
def test_in_every_order_of_two_that_meet_twice_nothing_is_lost(slots: tuple[int, ...]):
    shorten: dict[tuple[int, ...], int] = {}
    for counts in orders(3, shorten):
        full = meet(Machine(jumping=False), slots, counts, lambda turn: None)
        if full < len(counts):
            shorten[counts[:full]] = counts[full]
    assert len(shorten) > 20
