"""One publisher and one collector that take turns, in every order of up to five turns: nothing committed is lost."""

from hashlib import sha256
from itertools import product

from model_store import ModelStore
from stored_blobs import blobs, needed, orphan

from infra.blobs import blob_path
from infra.gc import GRACE, GcReport, collecting
from infra.intents import FOLDER, Steps, StillHeld, holding
from infra.manifests import AdapterFacts, AdapterRecord, FileEntry, content_sha256, seal
from infra.versions import VersionLog

DATA = b"uploaded before, and cut short"


def publishing(store: ModelStore, facts: AdapterFacts, clock: list[float]) -> Steps[AdapterRecord]:
    """What Registry.publish_adapter does with one file, taken apart into requests."""
    file = FileEntry(path="weights", size=len(DATA), sha256=sha256(DATA).hexdigest())
    fields = facts.model_dump(mode="json") | {"kind": "adapter", "files": [file.model_dump()]}
    content = content_sha256(fields)
    fields |= {"schema_version": 1, "name": "colour", "content_sha256": content, "nonce": "", "created_at": 0}
    log = VersionLog(store, AdapterRecord, "adapters/colour")

    def work(still_held: StillHeld) -> Steps[AdapterRecord]:
        there = store.head(blob_path(file.sha256)) is not None
        yield 0.0
        if not there:
            orphan(store, DATA)
        yield 0.0
        still_held()
        return log.commit(content, lambda version: seal(fields | {"version": version}))

    return holding(store, frozenset([file.sha256]), work, lambda: clock[0])


def advance(steps: Steps[AdapterRecord] | Steps[GcReport], count: int, clock: list[float]) -> bool:
    """Take so many steps; whether that was to the end."""
    for _ in range(count):
        try:
            clock[0] += next(steps)
        except StopIteration:
            return True
    return False


def lengths(facts: AdapterFacts) -> tuple[int, int]:
    """Steps that a publisher and a collector take alone."""
    counts = []
    for steps_of in (publishing, collector):
        store, clock = orphaned(), [0.0]
        steps, count = steps_of(store, facts, clock), 0
        while not advance(steps, 1, clock):
            count += 1
        counts.append(count)
    return counts[0], counts[1]


def collector(store: ModelStore, _: AdapterFacts, clock: list[float]) -> Steps[GcReport]:
    return collecting(store, None, GRACE, delete=True, clock=lambda: clock[0])


def orphaned() -> ModelStore:
    store = ModelStore()
    orphan(store, DATA)
    store.now += 3 * GRACE
    return store


def test_in_every_order_of_turns_what_is_committed_is_there_and_nobody_waits_for_ever(facts: AdapterFacts):
    publisher_steps, collector_steps = lengths(facts)
    assert publisher_steps > 3
    assert collector_steps > 8
    removed = kept = 0
    turns = product(range(collector_steps + 1), range(publisher_steps + 1), range(1, collector_steps + 1))
    for before, publisher_turn, between in turns:
        store, clock = orphaned(), [0.0]
        publisher, other = publishing(store, facts, clock), collector(store, facts, clock)
        for steps, count in ((other, before), (publisher, publisher_turn), (other, between)):
            advance(steps, count, clock)
            assert needed(store) <= blobs(store), (before, publisher_turn, between)
        # The rest by turns, as one may wait for the other.
        unfinished = [publisher, other]
        for _ in range(1000):
            unfinished = [steps for steps in unfinished if not advance(steps, 1, clock)]
            assert needed(store) <= blobs(store), (before, publisher_turn, between)
            if not unfinished:
                break
        assert not unfinished
        assert needed(store) == blobs(store) == {sha256(DATA).hexdigest()}
        assert store.list(FOLDER) == []
        gone = sha256(DATA).hexdigest() in store.deleted
        removed, kept = removed + gone, kept + (not gone)
    # The collector came first in some orders, and the publisher in others.
    assert removed > 0
    assert kept > 0
