"""How publishing and garbage collection keep out of each other's way: two kinds of small notes in the store.

    gc/holds/ID.json      blobs that a publisher relies on, from before it looks at them until they are committed
    gc/intents/ID.json    blobs that a collector is about to delete

Each side writes its note first and then reads the other's, so of two that meet at least one knows. A collector
spares the blobs of every hold. A publisher waits until no intent names a blob of its own. So whatever is committed
is whole from its first moment, whoever dies and whenever.

Clocks are not compared across machines. A collector deletes for STOP_AFTER_S at most after it wrote its intent; who
has watched one intent for PATIENCE_S knows that its collector has finished or died, and removes it. Both are time that
went by on one machine, and a delete request may be under way for as long as the difference. A hold whose publisher
died is removed by a collector much later; a publisher that was only slow finds its hold gone, and starts over.
"""

import json
import secrets
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import TypeVar

from infra.errors import IntegrityError, ObjectMissingError, StoreError
from infra.storage import Store

FOLDER = "gc"
HOLDS = f"{FOLDER}/holds"
INTENTS = f"{FOLDER}/intents"
STOP_AFTER_S = 120.0
PATIENCE_S = 300.0
POLL_S = 1.0
MAX_ROUNDS = 8

R = TypeVar("R")
# A protocol as single steps, so that tests may put any steps of others between them: yields the seconds to wait.
Steps = Generator[float, None, R]


def elapsed() -> float:
    """Seconds from some moment in the past, counted on while the machine sleeps where the system can do that."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def run(steps: Steps[R]) -> R:
    """Take all steps, waiting where they ask for it."""
    while True:
        try:
            pause = next(steps)
        except StopIteration as done:
            result: R = done.value
            return result
        if pause:
            time.sleep(pause)


def write_note(store: Store, folder: str, blobs: Iterable[str]) -> str:
    """Write a new hold or intent on these blobs; returns its path."""
    path = f"{folder}/{secrets.token_hex(16)}.json"
    store.create(path, json.dumps({"blobs": sorted(blobs)}).encode())
    return path


def read_note(store: Store, path: str) -> frozenset[str]:
    """The blobs that a note names, none when it is gone. Raises IntegrityError for a damaged one."""
    try:
        blobs = json.loads(store.read(path))["blobs"]
        return frozenset(map(str, blobs))
    except ObjectMissingError:
        return frozenset()
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{store.url}/{path} is damaged: delete it while nobody publishes or collects") from None


def held(store: Store, blobs: Iterable[str], work: Callable[[], R]) -> R:
    """Do `work`, which stores these blobs and commits them, while no collector deletes any of them.

    `work` may be done more than once. Raises StoreError when the store does not keep the hold.
    """

    def at_once() -> Steps[R]:
        yield 0.0
        return work()

    return run(holding(store, frozenset(blobs), at_once))


def holding(
    store: Store, blobs: frozenset[str], work: Callable[[], Steps[R]], clock: Callable[[], float] = elapsed
) -> Steps[R]:
    """The steps of `held`."""
    for _ in range(MAX_ROUNDS):
        hold = write_note(store, HOLDS, blobs)
        yield 0.0
        try:
            if (yield from _undisputed(store, hold, blobs, clock)):
                result = yield from work()
                yield 0.0
                # While the hold stands, no collector has missed both the hold and the commit.
                if store.head(hold) is not None:
                    _release(store, hold)
                    return result
        except StoreError:
            # The commit may arrive yet: its blobs stay held.
            raise
        except Exception:
            _release(store, hold)
            raise
        _release(store, hold)
        yield POLL_S
    raise StoreError(
        f"{store.url}/{FOLDER} does not keep, or does not list, what is written there: see that nothing else deletes "
        "from it, then publish again"
    )


def outlast(store: Store, in_the_way: Callable[[], set[str]], clock: Callable[[], float] = elapsed) -> Steps[None]:
    """Wait until none of these intents stands; removes those whose collectors must have died."""
    first_seen: dict[str, float] = {}
    while paths := in_the_way():
        for path in paths:
            since = first_seen.setdefault(path, clock())
            if clock() - since >= PATIENCE_S:
                store.delete(path)
        yield POLL_S


def _release(store: Store, hold: str) -> None:
    # One that stays behind is in nobody's way, and what was published must not fail for it.
    with suppress(StoreError):
        store.delete(hold)


def _undisputed(store: Store, hold: str, blobs: frozenset[str], clock: Callable[[], float]) -> Steps[bool]:
    """Wait until no intent names one of the blobs; False when the hold is gone, or not listed yet."""
    named: dict[str, bool] = {}
    stands = True

    def in_the_way() -> set[str]:
        nonlocal stands
        listed = store.list(FOLDER)
        stands = hold in listed
        for path in listed:
            if path.startswith(f"{INTENTS}/") and path not in named:
                named[path] = _names_any(store, path, blobs)
        return {path for path in listed if named.get(path)} if stands else set()

    yield from outlast(store, in_the_way, clock)
    return stands


def _names_any(store: Store, path: str, blobs: frozenset[str]) -> bool:
    try:
        return not blobs.isdisjoint(read_note(store, path))
    except IntegrityError:
        return True
