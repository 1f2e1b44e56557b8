"""A finished evaluation as pandas tables; workers/evaluation/README.md says what their columns are."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from infra.errors import ObjectMissingError
from infra.evaluations import Evaluation, evaluations_behind, evaluations_of
from infra.storage import Store, open_store
from workers.bundles import DEFAULT_BUNDLE, find_record
from workers.evaluation.config import EvaluationError
from workers.evaluation.files import COMMIT, SAMPLES, SCHEMA_VERSION, SUMMARY_TABLE
from workers.evaluation.oracle_shares import oracle_columns, rival_columns
from workers.evaluation.storing import settings_for

Table = Literal["summary", "samples", "methods", "hypervolumes", "oracles", "rivals"]


def load_evaluation(
    source: str | os.PathLike[str] = DEFAULT_BUNDLE,
    digest: str | None = None,
    *,
    table: Table = "summary",
    store_url: str | None = None,
) -> pd.DataFrame:
    """One table of a finished evaluation; `attrs` of the frame holds its facts: bundle, digest, date, prompts, ...

    source: a bundle reference, whose newest evaluation is read, or that whose digest begins with `digest`; or the
    directory of an evaluation, as a Path or as a string with a slash. Evaluations in the store come before those that
    the package brings. Raises EvaluationError where there is none or it cannot be read, InfraError from the store.
    """
    if table not in get_args(Table):
        raise EvaluationError(f"table {table!r} is none of {', '.join(get_args(Table))}")
    if isinstance(source, os.PathLike) or "/" in source:
        where, read = str(source), _directory(Path(source))
    else:
        store, evaluation = _find(source, digest, store_url)
        where, read = f"evaluation {evaluation.short} of {source}", _folder(store, evaluation.path)
    summary = _summary(read, where)
    if not summary["facts"]["digest"].startswith(digest or ""):
        raise EvaluationError(f"{where} is evaluation {summary['facts']['digest'][:12]}, not {digest!r}")
    frame = _table(read, summary, table, where)
    frame.attrs = dict(summary["facts"])
    return frame


Read = Callable[[str], bytes | None]


def _directory(path: Path) -> Read:
    def read(name: str) -> bytes | None:
        try:
            return (path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return read


def _folder(store: Store, path: str) -> Read:
    def read(name: str) -> bytes | None:
        try:
            return store.read(f"{path}/{name}")
        except ObjectMissingError:
            return None

    return read


def _find(ref: str, digest: str | None, store_url: str | None) -> tuple[Store, Evaluation]:
    """The newest evaluation of the bundle, or the one that the digest names, and where it lies."""
    settings = settings_for(store_url)
    registry, record = find_record(ref, settings)
    own = open_store(settings.store_url, settings)
    found = [(own, one) for one in evaluations_of(own, record)]
    # a bundle that comes with the package is evaluated into the user's own store
    if digest or not found:
        found += [(registry.store, one) for one in evaluations_behind(registry, record)]
    if not found:
        raise EvaluationError(
            f"bundle {record.ref} was never evaluated: run `diffusion-blend evaluate RUN.toml --bundle {record.ref}`"
        )
    matching = {one.digest: (place, one) for place, one in reversed(found) if one.digest.startswith(digest or "")}
    known = ", ".join(dict.fromkeys(one.short for _, one in found))
    if not matching:
        raise EvaluationError(f"bundle {record.ref} has no evaluation {digest!r}; it has: {known}")
    if digest and len(matching) > 1:
        raise EvaluationError(
            f"evaluation {digest!r} of {record.ref} is ambiguous: give more of the digest; of {known}"
        )
    return list(matching.values())[-1]


def _summary(read: Read, where: str) -> dict[str, Any]:
    written = read(COMMIT)
    if written is None:
        raise EvaluationError(f"{where} holds no finished evaluation: {COMMIT}, which is written last, is missing")
    try:
        summary = json.loads(written)
        schema, _ = summary["schema_version"], summary["facts"]["digest"]
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(f"{COMMIT} of {where} is damaged: evaluate again") from None
    if schema != SCHEMA_VERSION:
        raise EvaluationError(
            f"{COMMIT} of {where} has schema version {schema}, this software reads {SCHEMA_VERSION}: update it"
        )
    return summary


def _table(read: Read, summary: dict[str, Any], table: Table, where: str) -> pd.DataFrame:
    """Parquet files where they lie; what is in the summary anyway needs none."""
    file = {"samples": SAMPLES, "summary": SUMMARY_TABLE}.get(table)
    written = read(file) if file else None
    if written is not None:
        try:
            return pd.read_parquet(io.BytesIO(written))
        except (ValueError, OSError) as error:
            raise EvaluationError(f"{file} of {where} is damaged ({error}): evaluate again") from None
    if table == "samples":
        raise EvaluationError(
            f"{where} came without {SAMPLES}, as those in the package do: use table='summary', or evaluate it yourself"
        )
    records, columns = _records(summary, table)
    # JSON has null where a figure is undefined
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in records]
    return pd.DataFrame(rows, columns=None if rows else columns)


def _records(summary: dict[str, Any], table: Table) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Rows of a table, and the columns that it has even without rows, where those are known."""
    # evaluations from before there were oracles do not mention them
    if table == "oracles":
        return summary.get(table, []), oracle_columns(list(summary["facts"]["adapters"]))
    if table == "rivals":
        return summary.get(table, []), rival_columns()
    return summary["cells" if table == "summary" else table], None
