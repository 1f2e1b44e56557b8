"""How publishing and garbage collection keep out of each other's way: two kinds of small notes in the store.

    gc/holds/ID.json      blobs that a publisher relies on, from before it looks at them until they are committed
    gc/intents/ID.json    blobs that a collector is about to delete

Each side writes its note first and then reads the other's, so of two that meet at least one knows. A collector
spares the blobs of every hold. A publisher waits until no intent names a blob of its own. So whatever is committed
is whole from its first moment, whoever dies and whenever.

Clocks are not compared across machines. A collector deletes for STOP_AFTER_S at most after it wrote its intent; who
has watched one intent for PATIENCE_S knows that its collector has finished or died, and removes it. Both are time that
went by on one machine, and a delete request may be under way for as long as the difference. A hold is taken for that
of a dead publisher when the store's own stamps say that it is older than HOLD_LIFETIME; a publisher who needs half of
that, by its own watch, takes a new one before it commits.

What this does not provide for: a machine that stops for minutes, unnoticed by its own watch, between looking at it and
asking for a delete; a store whose clock jumps by half a day while a publisher commits and then dies; a store that lists
late, as file systems over a network may. What is lost by these, the next publish of the same files brings back.
"""

import json
import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from infra.errors import IntegrityError, ObjectMissingError, StoreError
from infra.manifests import seal
from infra.storage import Store

FOLDER = "gc"
HOLDS = f"{FOLDER}/holds"
INTENTS = f"{FOLDER}/intents"
CHECKSUM = "checksum"
STOP_AFTER_S = 120.0
PATIENCE_S = 300.0
# Publishers do not renew their holds: longer than the longest upload.
HOLD_LIFETIME = timedelta(days=1)
POLL_S = 1.0
MAX_ROUNDS = 8

R = TypeVar("R")
# A protocol as single steps, so that tests may put any steps of others between them: yields the seconds to wait.
Steps = Generator[float, None, R]
# What publishers call right before they commit.
StillHeld = Callable[[], None]
log = logging.getLogger(__name__)


class HoldLapsedError(Exception):
    """So much time went by that collectors may take the publisher for dead; `holding` starts over."""


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
    store.create(path, seal({"blobs": sorted(blobs)}, CHECKSUM))
    return path


def read_note(store: Store, path: str) -> frozenset[str]:
    """The blobs that a note names, none when it is gone. Raises IntegrityError for a damaged one."""
    try:
        raw = store.read(path)
        fields = json.loads(raw)
        if raw != seal(fields, CHECKSUM):
            raise ValueError
        return frozenset(map(str, fields["blobs"]))
    except ObjectMissingError:
        return frozenset()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{store.url}/{path} is damaged: delete it while nobody publishes or collects") from None


def held(store: Store, blobs: Iterable[str], work: Callable[[StillHeld], R]) -> R:
    """Do `work`, which stores these blobs and commits them, while no collector deletes any of them.

    `work` is given a function to call between the two, lets pass what that raises, and may be done more than once.
    Raises StoreError when the store does not keep the hold.
    """

    def at_once(still_held: StillHeld) -> Steps[R]:
        yield 0.0
        return work(still_held)

    return run(holding(store, frozenset(blobs), at_once))


def holding(
    store: Store, blobs: frozenset[str], work: Callable[[StillHeld], Steps[R]], clock: Callable[[], float] = elapsed
) -> Steps[R]:
    """The steps of `held`."""
    for _ in range(MAX_ROUNDS):
        still_held = _watch(clock)
        hold = write_note(store, HOLDS, blobs)
        yield 0.0
        try:
            if (yield from _undisputed(store, hold, blobs, clock)):
                result = yield from work(still_held)
                yield 0.0
                # While the hold stands, no collector has missed both the hold and the commit.
                if store.head(hold) is not None:
                    _release(store, hold)
                    return result
        except HoldLapsedError:
            pass
        except StoreError:
            # The commit may arrive yet: its blobs stay held.
            raise
        except Exception:
            _release(store, hold)
            raise
        _release(store, hold)
        yield POLL_S
    raise StoreError(
        f"{store.url}/{FOLDER} does not keep, or does not list, what is written there, or {MAX_ROUNDS} tries took "
        f"longer than {HOLD_LIFETIME / 2} each: see that nothing else deletes from it, then publish again"
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


def _watch(clock: Callable[[], float]) -> StillHeld:
    """A check that no more than half a hold's lifetime has gone by from now on."""
    begun = clock()

    def still_held() -> None:
        if clock() - begun > HOLD_LIFETIME.total_seconds() / 2:
            raise HoldLapsedError

    return still_held


def _release(store: Store, hold: str) -> None:
    # One that stays behind is in nobody's way, and what was published must not fail for it.
    with suppress(StoreError):
        store.delete(hold)


def _undisputed(store: Store, hold: str, blobs: frozenset[str], clock: Callable[[], float]) -> Steps[bool]:
    """Wait until no intent names one of the blobs; False when the hold is gone, or not listed yet."""
    named: dict[str, bool] = {}
    stands, waiting = True, False

    def in_the_way() -> set[str]:
        nonlocal stands, waiting
        listed = store.list(FOLDER)
        stands = hold in listed
        for path in listed:
            if path.startswith(f"{INTENTS}/") and path not in named:
                named[path] = _names_any(store, path, blobs)
        found = {path for path in listed if named.get(path)} if stands else set()
        if found and not waiting:
            log.warning("waiting for a garbage collection of %s, %d s if it was cut short", store.url, PATIENCE_S)
        waiting |= bool(found)
        return found

    yield from outlast(store, in_the_way, clock)
    return stands


def _names_any(store: Store, path: str, blobs: frozenset[str]) -> bool:
    try:
        return not blobs.isdisjoint(read_note(store, path))
    except IntegrityError:
        return True
