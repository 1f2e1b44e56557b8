"""Garbage collection: deletes blobs that no manifest names, of uploads that were cut short long ago.

Manifests, aliases and evaluations are never deleted. What is deleted while others publish, and what not, is settled by
the notes of infra.intents; `grace` protects those who publish without any. A registry with a manifest that is lost,
damaged or newer than this software is not collected: nobody could say which blobs it needs.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from infra.blobs import blob_path
from infra.errors import IntegrityError, ObjectMissingError, ReadOnlyError, RegistryError, StoreError
from infra.intents import (
    FOLDER,
    HOLD_LIFETIME,
    HOLDS,
    INTENTS,
    STOP_AFTER_S,
    Steps,
    elapsed,
    outlast,
    read_note,
    run,
    write_note,
)
from infra.manifests import AdapterRecord, BundleRecord, Commit
from infra.registry import Registry
from infra.storage import Listed, Store
from infra.versions import VersionLog

GRACE = timedelta(days=1)
# Blobs to an intent: few enough to be deleted well before STOP_AFTER_S, at a tenth of a second each.
BATCH = 500
BLOBS = blob_path("").rstrip("/")


@dataclass(frozen=True, slots=True)
class GcReport:
    """Stored blobs, by what is to become of them, and what was done."""

    referenced: int
    young: int  # named by no manifest, but younger than the grace period or held by a publisher
    orphans: tuple[Listed, ...]  # named by no manifest, and to be deleted
    removed: tuple[Listed, ...]  # those of the orphans that were
    aborted_uploads: int

    @property
    def bytes(self) -> int:
        """Sum of the orphans' sizes."""
        return sum(listed.size for listed in self.orphans)


def collect(
    registry: Registry,
    *,
    grace: timedelta = GRACE,
    delete: bool = False,
    now: datetime | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> GcReport:
    """Find orphaned blobs; with `delete`, remove them and abort uploads begun before the grace period, or a day ago.

    `now`: with its time zone; unless given, the store's clock where something is deleted, else this machine's.
    `on_progress` is told what is being done. Raises RegistryError for a registry that cannot be collected, StoreError.
    """
    if delete and registry.read_only:
        raise ReadOnlyError(f"cannot delete from {registry.store.url}: it is read-only. Use a store of your own")
    if grace < timedelta(0) or (now and now.tzinfo is None):
        raise RegistryError(f"grace {grace} must not be negative, and now {now} must have a time zone: correct them")
    return run(collecting(registry.store, now, grace, delete=delete, on_progress=on_progress))


def collecting(
    store: Store,
    now: datetime | None,
    grace: timedelta,
    *,
    delete: bool,
    on_progress: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = elapsed,
) -> Steps[GcReport]:
    """The steps of `collect`."""
    on_progress("listing blobs")
    others = set(store.list(INTENTS))
    yield 0.0
    stamp = (yield from _ask_time(store)) if delete else datetime.now(UTC)
    now = now or stamp
    holds = yield from _living(store, stamp, bury=delete)
    spared = yield from _held(store, holds)
    # Blobs before manifests: one that is stored later is not looked at, one that is committed meanwhile is referenced.
    stored = {blob: listed for listed in store.listing(BLOBS) if (blob := _blob(listed.path))}
    yield 0.0
    on_progress("reading manifests")
    marks = Marks(store)
    yield from marks.refresh()
    unreferenced = {blob: listed for blob, listed in stored.items() if blob not in marks.blobs}
    orphans = sorted(
        blob for blob, listed in unreferenced.items() if listed.modified <= now - grace and blob not in spared
    )
    removed: list[str] = []
    aborted = 0
    if delete:
        for start in range(0, len(orphans), BATCH):
            on_progress(f"deleting {len(orphans)} orphans, {len(removed)} are gone")
            removed += yield from _remove(store, orphans[start : start + BATCH], marks, clock)
        yield 0.0
        # Even without grace: no upload that may be under way.
        aborted = store.abort_uploads(now - max(grace, HOLD_LIFETIME))
        if others:
            # Those whose collectors died are removed, so that no publisher has to wait as long.
            on_progress("waiting for another collection to end, five minutes if it was cut short")
            yield from outlast(store, lambda: others.intersection(store.list(INTENTS)), clock)
    return GcReport(
        referenced=len(stored) - len(unreferenced),
        young=len(unreferenced) - len(orphans),
        orphans=tuple(stored[blob] for blob in orphans),
        removed=tuple(stored[blob] for blob in removed),
        aborted_uploads=aborted,
    )


class Marks:
    """Blobs that manifests name. Manifests never change, so a refresh reads only the new ones."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.blobs: set[str] = set()
        self._read: dict[str, int] = {}

    def refresh(self) -> Steps[None]:
        """Read what was committed since. Raises IntegrityError or SchemaError for a manifest that cannot be read."""
        models: dict[str, type[Commit]] = {"adapters": AdapterRecord, "bundles": BundleRecord}
        for folder, model in models.items():
            for name in self.store.folders(folder):
                yield 0.0
                yield from self._follow(VersionLog(self.store, model, f"{folder}/{name}"))

    def _follow(self, log: VersionLog[Commit]) -> Steps[None]:
        listed = [_version(path) for path in self.store.list(f"{log.folder}/versions")]
        last = max(listed, default=0)
        # On past the last one listed, for the sake of stores whose listings lag.
        while True:
            yield 0.0
            version = self._read.get(log.folder, 0) + 1
            try:
                record = log.read(version)
            except ObjectMissingError:
                break
            # Bundles have no files of their own, so far.
            self.blobs.update(file.sha256 for file in getattr(record, "files", ()))
            self._read[log.folder] = version
        if version <= last:
            raise IntegrityError(
                f"{self.store.url}/{log.path(version)} is missing, and the blobs it names are unknown: restore it from "
                "a copy of the store before collecting garbage"
            )


def _ask_time(store: Store) -> Steps[datetime]:
    """The time by the store's clock, from the stamp of a note that names nothing."""
    note = write_note(store, INTENTS, ())
    yield 0.0
    stamps = [listed.modified for listed in store.listing(INTENTS) if listed.path == note]
    yield 0.0
    store.delete(note)
    yield 0.0
    if not stamps:
        raise _lists_late(store)
    return stamps[0]


def _living(store: Store, now: datetime, *, bury: bool) -> Steps[list[str]]:
    """Holds of publishers who may be alive; with `bury`, the others' are removed. `now`: by the store's clock."""
    holds = store.listing(HOLDS)
    dead = {hold.path for hold in holds if now - hold.modified > HOLD_LIFETIME}
    for path in sorted(dead) if bury else ():
        yield 0.0
        store.delete(path)
    yield 0.0
    return [hold.path for hold in holds if hold.path not in dead]


def _remove(store: Store, orphans: Sequence[str], marks: Marks, clock: Callable[[], float]) -> Steps[list[str]]:
    """Delete those that are orphans still once the intent to do so can be seen; returns which."""
    removed: list[str] = []
    yield 0.0
    started = clock()
    intent = write_note(store, INTENTS, orphans)
    yield 0.0
    try:
        doomed = yield from _doomed(store, orphans, intent, marks)
    except Exception:
        with suppress(StoreError):
            store.delete(intent)
        raise
    for blob in doomed:
        yield 0.0
        if clock() - started > STOP_AFTER_S:
            break
        # Should this fail, it may be done all the same, and late: the intent is left for others to outlast.
        store.delete(blob_path(blob))
        removed.append(blob)
    yield 0.0
    store.delete(intent)
    return removed


def _doomed(store: Store, orphans: Sequence[str], intent: str, marks: Marks) -> Steps[list[str]]:
    """The orphans that no publisher holds and no manifest names by now."""
    notes = store.list(FOLDER)
    if intent not in notes:
        raise _lists_late(store)
    yield 0.0
    held = yield from _held(store, [path for path in notes if path.startswith(f"{HOLDS}/")])
    # Holds before manifests: one that went away meanwhile went after its commit.
    yield from marks.refresh()
    return [blob for blob in orphans if blob not in held and blob not in marks.blobs]


def _lists_late(store: Store) -> StoreError:
    return StoreError(
        f"{store.url} does not list at once what is written to it, so that nothing can be deleted safely: keep the "
        "registry in a store that does (AWS S3, MinIO, SeaweedFS, Ceph, a local directory)"
    )


def _held(store: Store, holds: Sequence[str]) -> Steps[set[str]]:
    blobs: set[str] = set()
    for path in holds:
        blobs |= read_note(store, path)
        yield 0.0
    return blobs


def _blob(path: str) -> str:
    """The hash that a blob's path ends in; empty for a stray, which is no business of ours."""
    name = path.removeprefix(f"{BLOBS}/")
    return name if re.fullmatch("[0-9a-f]{64}", name) else ""


def _version(path: str) -> int:
    found = re.search(r"/(\d{6,})\.json$", path)
    return int(found[1]) if found else 0
