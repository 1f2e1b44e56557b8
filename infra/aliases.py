"""Aliases: names such as `champion` that move from version to version by compare-and-swap, and forget nothing.

`aliases/champion.json` is the entry that holds now. Before it is overwritten, it is filed under
`aliases/champion/000004.json` (its seq), create-only, so no move is ever lost from the history.
"""

import secrets
from datetime import UTC, datetime

from infra.errors import (
    AliasMovedError,
    ConflictError,
    IntegrityError,
    ObjectExistsError,
    ObjectMissingError,
    RegistryError,
    UnknownRecordError,
)
from infra.manifests import AliasEntry, Commit, check_name, seal, unseal
from infra.storage import Store


def check_alias(alias: str) -> str:
    """The alias itself, or RegistryError: `name@7` is always version 7 and `name@latest` the newest."""
    check_name(alias, "alias")
    if alias.isdigit() or alias == "latest":
        raise RegistryError(f"alias {alias!r} is reserved: choose one that is neither a number nor 'latest'")
    return alias


class Alias:
    """One alias of one adapter or bundle; `folder` is that of its name, for instance "bundles/sprites"."""

    def __init__(self, store: Store, folder: str, alias: str) -> None:
        self.store = store
        self.alias = check_alias(alias)
        self.path = f"{folder}/aliases/{alias}.json"
        self.archive = f"{folder}/aliases/{alias}"
        self.ref = f"{folder.split('/')[-1]}@{alias}"

    def read(self) -> AliasEntry | None:
        """The entry that holds now; None when the alias was never set."""
        return self._read_tagged()[0]

    def history(self) -> list[AliasEntry]:
        """Every move, oldest first. Raises IntegrityError when one is missing."""
        entry = self.read()
        if entry is None:
            return []
        return [*(self._archived(seq) for seq in range(1, entry.seq)), entry]

    def move(
        self, record: Commit, *, actor: str, reason: str, expected_seq: int | None = None, restores: int | None = None
    ) -> AliasEntry:
        """Point the alias at a version; it being there already is no move.

        `expected_seq`: the entry that the caller has seen (0 for none). Raises AliasMovedError when another holds,
        or when someone else moves it at the same time.
        """
        current, raw, etag = self._read_tagged()
        seq = current.seq if current else 0
        if expected_seq is not None and seq != expected_seq:
            raise self._moved(expected_seq, current)
        if current and (current.version, current.digest) == (record.version, record.digest):
            return current
        entry = _entry(record, seq + 1, actor, reason, restores)
        data = seal(entry.model_dump(mode="json"), "checksum")
        try:
            if current:
                self._file(current.seq, raw)
                self.store.replace(self.path, data, etag)
            else:
                self.store.create(self.path, data)
        except (ConflictError, ObjectExistsError):
            if not self._was_moved_by(entry):
                raise self._moved(seq, self.read()) from None
        return unseal(AliasEntry, data, self.path)

    def set_once(self, record: Commit, *, actor: str, reason: str) -> AliasEntry:
        """Point a new alias at a version for good. Raises AliasMovedError when it points at another."""
        current = self.read()
        if current is not None and (current.version, current.digest) == (record.version, record.digest):
            return current
        try:
            return self.move(record, actor=actor, reason=reason, expected_seq=0)
        except AliasMovedError:
            raise AliasMovedError(
                f"{self.ref} is taken, and tags do not move: choose another tag, or `promote` to move an alias"
            ) from None

    def previous(self) -> tuple[AliasEntry, AliasEntry]:
        """What holds now, and the move that a rollback goes back to: rollbacks in a row walk further back."""
        current = self.read()
        if current is None:
            raise UnknownRecordError(f"{self.ref} was never set: promote a version first")
        for seq in range((current.restores or current.seq) - 1, 0, -1):
            earlier = self._archived(seq)
            if earlier.version != current.version and earlier.restores is None:
                return current, earlier
        raise UnknownRecordError(f"{self.ref} has no version before {current.version} to go back to")

    def _read_tagged(self) -> tuple[AliasEntry | None, bytes, str]:
        try:
            data, etag = self.store.read_tagged(self.path)
        except ObjectMissingError:
            return None, b"", ""
        return unseal(AliasEntry, data, f"{self.store.url}/{self.path}"), data, etag

    def _archived(self, seq: int) -> AliasEntry:
        path = f"{self.archive}/{seq:06d}.json"
        try:
            return unseal(AliasEntry, self.store.read(path), f"{self.store.url}/{path}")
        except ObjectMissingError:
            raise IntegrityError(f"{self.store.url}/{path} is missing: restore it from a copy of the store") from None

    def _file(self, seq: int, raw: bytes) -> None:
        path = f"{self.archive}/{seq:06d}.json"
        try:
            self.store.create(path, raw)
        except ObjectExistsError:
            raise IntegrityError(
                f"{self.store.url}/{path} differs from the move that was made: restore it from a copy of the store"
            ) from None

    def _was_moved_by(self, entry: AliasEntry) -> bool:
        """Whether this very move took place after all (its reply was lost), maybe with others after it."""
        current = self.read()
        if current is None or current.seq < entry.seq:
            return False
        return (current if current.seq == entry.seq else self._archived(entry.seq)).nonce == entry.nonce

    def _moved(self, seen: int, current: AliasEntry | None) -> AliasMovedError:
        now = f"version {current.version} (move {current.seq} by {current.actor})" if current else "not set"
        return AliasMovedError(
            f"{self.ref} was moved by someone else: expected move {seen}, it is now {now}. "
            "Look at it, then promote again"
        )


def _entry(record: Commit, seq: int, actor: str, reason: str, restores: int | None) -> AliasEntry:
    return AliasEntry(
        version=record.version,
        digest=record.digest,
        seq=seq,
        actor=actor,
        reason=reason,
        restores=restores,
        nonce=secrets.token_hex(16),
        created_at=datetime.now(UTC),
        checksum="0" * 64,
    )
