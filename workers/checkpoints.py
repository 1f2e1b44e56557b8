"""Where a run's checkpoints lie: a directory, or an object store that may be away for a while.

In a store, `<root>/files/<id>/` holds a checkpoint's files and `<root>/manifests/<id>.json`, created last and
once, is the commit; an id is the iteration and the manifest's hash, so that two writers never meet.
"""

import hashlib
import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from blend.finetune.checkpoint import (
    KEPT,
    MANIFEST_FILE,
    CheckpointFolder,
    Checkpoints,
    find_damage,
    iteration_of,
    parse_manifest,
)
from blend.finetune.errors import CheckpointError, ResumeError
from blend.finetune.trainer import Trainer
from infra.errors import (
    BucketMissingError,
    ConflictError,
    ObjectExistsError,
    ObjectMissingError,
    StoreAccessError,
    StoreError,
)
from infra.local_store import LocalStore
from infra.settings import Settings, read_settings
from infra.storage import Store, open_store

# How long a store may be away, all tries together, before the run ends.
DEADLINE_S = 600.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0

# Trying again does not help: the store answered, and meant it.
FINAL_ERRORS = (StoreAccessError, BucketMissingError, ObjectMissingError, ObjectExistsError, ConflictError)

log = logging.getLogger(__name__)
T = TypeVar("T")


def checkpoint_location(
    run: str, output_dir: Path, store_url: str | None = None, settings: Settings | None = None
) -> str:
    """Where the checkpoints of `run` (its name and digest) go: with the results, or with the registry when it is in S3.

    So a retry on another machine resumes wherever it could publish.
    """
    url = store_url or (settings or read_settings()).store_url
    if urlsplit(url).scheme in ("", "file"):
        return str(output_dir / "checkpoints")
    return f"{url.rstrip('/')}/runs/{run}"


def open_checkpoints(location: str | Path, cache: Path, settings: Settings | None = None) -> Checkpoints:
    """The checkpoints in a directory or at a store's URL, with a copy of the newest in `cache` when they are remote.

    Raises StoreError for a URL that is not understood.
    """
    store = open_store(str(location), settings)
    return CheckpointFolder(store.root) if isinstance(store, LocalStore) else StoredCheckpoints(store, cache)


def pauses(spread: Callable[[float, float], float] = random.uniform) -> Iterator[float]:
    """Seconds between tries: doubling, with half of each left to chance so that many runs do not knock together."""
    longest = FIRST_PAUSE_S
    while True:
        yield spread(longest / 2, longest)
        longest = min(2 * longest, LONGEST_PAUSE_S)


def insist(
    call: Callable[[], T], *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> T:
    """Call until the store does it or DEADLINE_S have passed; what it refuses is not asked again."""
    until = clock() + DEADLINE_S
    for count, pause in enumerate(pauses()):
        try:
            return call()
        except FINAL_ERRORS:
            raise
        except StoreError as error:
            if clock() + pause > until:
                raise
            if count == 0:
                log.warning("%s; trying again for up to %.0f s", error, DEADLINE_S)
        sleep(pause)
    raise AssertionError("pauses never end")


@dataclass(frozen=True, order=True, slots=True)
class _Entry:
    """A committed checkpoint of the store."""

    iteration: int
    id: str

    @property
    def manifest(self) -> str:
        return f"manifests/{self.id}.json"

    @property
    def files(self) -> str:
        return f"files/{self.id}"

    @classmethod
    def of(cls, path: str) -> "_Entry | None":
        """From a manifest's or a file's path below the root; None for what is not a checkpoint's."""
        found = re.match(r"(?:manifests|files)/((\d{6,})-[0-9a-f]+)(?:\.json$|/)", path)
        return cls(int(found[2]), found[1]) if found else None

    @classmethod
    def all_of(cls, paths: Iterable[str]) -> "list[_Entry]":
        """Oldest first, each once."""
        return sorted({entry for path in paths if (entry := cls.of(path))})


class StoredCheckpoints:
    """The checkpoints of one run, at the root of a store; `cache` holds the newest on this machine.

    Every call goes on through DEADLINE_S of outage; CheckpointError then names the store and the local copy.
    """

    def __init__(self, store: Store, cache: Path) -> None:
        self.store = store
        self.cache = CheckpointFolder(cache)

    def save(self, trainer: Trainer) -> Path:
        """Write here, upload, commit; older checkpoints go after that."""
        path = self.cache.save(trainer)
        self._commit(path)
        return path

    def latest(self) -> Path | None:
        """The newest of the store's checkpoints that verify, or this machine's copy when it is not older."""
        local = self._cached()
        entries = self._entries()
        for entry in reversed(entries):
            if local is not None and iteration_of(local) >= entry.iteration:
                break
            try:
                return self._fetch(entry)
            except CheckpointError:  # a ValueError too, but the store's own trouble: nothing is known to be damaged
                raise
            except (ObjectMissingError, ValueError) as error:
                log.warning(
                    "the checkpoint %s/%s is damaged (%s): going on from an earlier one",
                    self.store.url,
                    entry.manifest,
                    error,
                )
        if local is not None:
            if not any(entry.iteration >= iteration_of(local) for entry in entries):
                self._commit(local)
            return local
        if entries:
            raise ResumeError(
                f"none of the {len(entries)} checkpoints in {self.store.url} is whole: remove them to train anew"
            )
        return None

    def _cached(self) -> Path | None:
        try:
            return self.cache.latest()
        except ResumeError as error:
            log.warning("%s; the store's are used", error)
            return None

    def _entries(self) -> list[_Entry]:
        """What is committed, oldest first."""
        paths = self._ask("the checkpoints cannot be read", lambda: self.store.list("manifests"))
        return _Entry.all_of(paths)

    def _commit(self, directory: Path) -> None:
        manifest = (directory / MANIFEST_FILE).read_bytes()
        iteration = iteration_of(directory)
        entry = _Entry(iteration, f"{iteration:06d}-{hashlib.sha256(manifest).hexdigest()[:16]}")
        what = f"the checkpoint of iteration {iteration} is not stored; it lies in {directory}"
        for name in parse_manifest(manifest):
            path = f"{entry.files}/{name}"
            self._ask(what, lambda path=path, name=name: self._upload(path, directory / name))
        self._ask(what, lambda: self.store.create(entry.manifest, manifest))
        self._remove_older(entry)

    def _upload(self, path: str, source: Path) -> None:
        """Store a file of a checkpoint; the path names the content, so that other content there is damage."""
        try:
            self.store.upload(path, source)
        except ObjectExistsError:
            log.warning("%s/%s is damaged: it is written again", self.store.url, path)
            self.store.delete(path)
            self.store.upload(path, source)

    def _fetch(self, entry: _Entry) -> Path:
        """Download into the cache; ObjectMissingError or ValueError where it is damaged."""
        what = f"the checkpoint of iteration {entry.iteration} cannot be read"
        partial = self.cache.unfinished()
        try:
            manifest = self._ask(what, lambda: self.store.read(entry.manifest))
            for name in parse_manifest(manifest):
                path = f"{entry.files}/{name}"
                self._ask(what, lambda path=path, name=name: self.store.download(path, partial / name))
            (partial / MANIFEST_FILE).write_bytes(manifest)
            if damage := find_damage(partial):
                raise ValueError(damage)
            return self.cache.adopt(partial, entry.iteration)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _remove_older(self, newest: _Entry) -> None:
        """Leave `newest` and the one before it; whatever cannot be removed now is by the next save."""
        try:
            manifests, files = self.store.list("manifests"), self.store.list("files")
            older = [entry for entry in _Entry.all_of(manifests) if entry.iteration < newest.iteration]
            kept = {newest, *older[1 - KEPT :]}
            # manifests first: a checkpoint whose files are going must not look whole
            for path in manifests + files:
                entry = _Entry.of(path)
                if entry and entry not in kept and entry.iteration <= newest.iteration:
                    self.store.delete(path)
        except StoreError as error:
            log.info("old checkpoints are left for now: %s", error)

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            return insist(call)
        except FINAL_ERRORS as error:
            if isinstance(error, ObjectMissingError):
                raise
            raise CheckpointError(f"{what}: {error}") from error
        except StoreError as error:
            raise CheckpointError(
                f"{what}: {error}. {self.store.url} did not do it within {DEADLINE_S:.0f} s: run again when it does"
            ) from error
