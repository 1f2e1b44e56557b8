"""Every sample that was ever scored, so that none is made twice: parquet parts beside the evaluations of a bundle.

    evaluations/<bundle digest>/samples/<sha256>.parquet        in the store, create-only; the same names in the cache

A row is one sample under its key (job.Job.key) in its company: the seeds that its diversity was measured among. Parts
are written while an evaluation runs: one that is killed goes on with what they hold. A reward's column is called
name@version, so that scores of different versions never meet.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from infra.errors import InfraError, ObjectExistsError
from infra.storage import Store

# A part is written this often, and later when the run has become long, so that parts stay few.
FLUSH_S, FLUSH_SHARE = 20.0, 0.02
Row = dict[str, Any]
Place = tuple[str, str]  # key and company


class Ledger:
    """Rows by key; without a directory they live as long as the object."""

    def __init__(self, directory: Path | None = None, store: Store | None = None, prefix: str = "") -> None:
        """Read all parts: those of the directory, and those that only the store has. Raises InfraError."""
        self._directory, self._store, self._prefix = directory, store, prefix
        self._rows: dict[Place, Row] = {}
        self._new: list[Row] = []
        self._unsent: list[Path] = []
        self._began = self._flushed = time.monotonic()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._fetch()
            for part in sorted(directory.glob("*.parquet")):
                self._read(part)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str, company: str) -> Row | None:
        """The row of a sample, or None."""
        return self._rows.get((key, company))

    def has(self, key: str, company: str, needed: Iterable[str]) -> bool:
        """Whether there is a row with these columns filled."""
        row = self._rows.get((key, company))
        return row is not None and all(row.get(name) is not None for name in needed)

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows with `key` and `company`; what a sample already has in other columns is kept."""
        self._new += [self._merge(row) for row in rows]
        now = time.monotonic()
        if now - self._flushed > max(FLUSH_S, FLUSH_SHARE * (now - self._began)):
            with suppress(InfraError):  # the store's turn comes again; the part is on the disk
                self.flush()

    def flush(self) -> None:
        """Write what is new as one part, here and in the store. Raises InfraError when the store does not take it."""
        self._flushed = time.monotonic()
        if self._directory is None:
            self._new.clear()
            return
        if self._new:
            data = _parquet(self._new)
            path = self._directory / f"{hashlib.sha256(data).hexdigest()}.parquet"
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(data)
            partial.replace(path)
            self._unsent.append(path)
            self._new.clear()
        while self._store is not None and self._unsent:
            with suppress(ObjectExistsError):  # named by its content
                self._store.upload(f"{self._prefix}/{self._unsent[0].name}", self._unsent[0])
            self._unsent.pop(0)

    def _fetch(self) -> None:
        """Download the parts that are not here, and note those that the store lacks."""
        if self._directory is None or self._store is None:
            return
        stored = {PurePosixPath(path).name: path for path in self._store.list(self._prefix)}
        for name, path in stored.items():
            if not (self._directory / name).exists():
                partial = self._directory / f"{name}.{os.getpid()}"
                self._store.download(path, partial)
                partial.replace(self._directory / name)
        self._unsent = [part for part in sorted(self._directory.glob("*.parquet")) if part.name not in stored]

    def _read(self, part: Path) -> None:
        data = part.read_bytes()
        if hashlib.sha256(data).hexdigest() != part.stem:  # cut short by a full disk, say: its samples are made again
            part.unlink()
            return
        table = pd.read_parquet(BytesIO(data))
        for row in table.to_dict("records"):
            filled: Row = {str(name): value for name, value in row.items() if not _is_empty(value)}
            self._merge(filled)

    def _merge(self, row: Row) -> Row:
        place = row["key"], row["company"]
        self._rows[place] = {**self._rows.get(place, {}), **row}
        return self._rows[place]


def _is_empty(value: object) -> bool:
    return value is None or value != value


def _parquet(rows: list[Row]) -> bytes:
    buffer = BytesIO()
    pd.DataFrame(rows).to_parquet(buffer, index=False)
    return buffer.getvalue()
