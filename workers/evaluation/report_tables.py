"""The tables of a report: methods and costs, retraining and rivals, all results, what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from infra.comparing import ADAPTERS_ALONE, change_in_words, mean_and_interval
from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ADAPTER, BASE, ORACLE
from workers.evaluation.labels import (
    cell_label,
    explanation,
    method_label,
    number,
    percent,
    span,
)
from workers.evaluation.plots import BLENDS
from workers.evaluation.plots_drift import lines_of
from workers.evaluation.report_words import span_percent

Row = Mapping[str, Any]
MARKS = {"better": "▲ better", "worse": "▼ worse"}
JUDGE_HEADS = {"colour_right": "Colours right", "object_right": "Things right", "binding_right": "Prompt followed"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure with its interval; `sure` where that excludes no difference."""

    value: str
    span: str = ""
    sure: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row: its name, a word on it, and a cell per column."""

    name: str
    about: str
    cells: tuple[Cell, ...]
    first: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """What the template needs of a table."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]


Column = tuple[str, Callable[[Row], Cell]]
MISSING = Cell("–")


def _table(names: Sequence[tuple[str, str, bool]], rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Leaves out the columns in which nothing was measured."""
    filled = [(head, [cell(row) for row in rows]) for head, cell in columns]
    filled = [(head, cells) for head, cells in filled if any(cell != MISSING for cell in cells)]
    lines = [
        Line(name, about, tuple(cells[place] for _, cells in filled), first)
        for place, (name, about, first) in enumerate(names)
    ]
    return Table(tuple(head for head, _ in filled), tuple(lines))


def methods_table(analysis: Analysis) -> Table:
    """Every front: what it keeps, how much it reaches, and what an image costs."""
    fronts = analysis.fronts.to_dict("records")
    overall = {row["method"]: row for row in analysis.overall.to_dict("records")}
    # oracles and rivals have a table of their own, and reach less for being measured at fewer mixes
    own = {BASE, ADAPTERS_ALONE, *BLENDS}
    shown = [row for row in fronts if analysis.rivals.empty or row["front"].partition(", ")[0] in own]
    rows = [{**_means(_members(analysis, row["front"])), **overall.get(row["front"], {}), **row} for row in shown]
    first = method_label(analysis.overall.iloc[0]["method"]) if len(analysis.overall) else ""
    columns: list[Column] = [
        ("Gain kept", _share),
        (f"Against {first}", _points),
        ("Reward space", _ratio),
        ("Short of the best (IGD+)", lambda row: _spanned(row, "igd")),
        *_cost_columns(rows, timed=analysis.timed),
        *_failure_column(rows),
        *_judge_columns(("binding_right",)),
    ]
    explained = set(analysis.rivals["method"])
    abouts = ["" if row["front"] in explained else explanation(row["front"]) for row in rows]
    names = [(method_label(row["front"]), about, False) for row, about in zip(rows, abouts, strict=True)]
    return _table(names, rows, columns)


def rivals_table(analysis: Analysis) -> Table | None:
    """The retrained models and every method, the nearest to them first; None where there are none."""
    if analysis.rivals.empty:
        return None
    order = analysis.rivals.sort_values("share_of_oracle", ascending=False, kind="stable")
    order = order.sort_values("method", key=lambda names: names != ORACLE, kind="stable")
    rows = order.to_dict("records")
    most = max(row["preferences"] for row in rows)
    names = []
    for row in rows:
        about = explanation(row["method"])
        if row["preferences"] < most:
            about += f" Measured at {row['preferences']} of the {most} mixes."
        names.append((method_label(row["method"]), about, False))
    columns: list[Column] = [
        ("Of the retrained model’s gain", lambda row: _spanned(row, "share_of_oracle", percent)),
        (f"Against {method_label('mpa')}", lambda row: _signed_cell(row, "difference", 2)),
        *_cost_columns(rows, timed=analysis.timed),
        ("Diversity", lambda row: _number(row, "diversity")),
        ("Path KL", lambda row: _number(row, "path_kl")),
        *_failure_column(rows),
        *_judge_columns(("binding_right",)),
    ]
    return _table(names, rows, columns)


def results_table(analysis: Analysis) -> Table:
    """Every setting: λ, mean and gain of each reward, share, costs and what else was measured."""
    rows = analysis.summary.to_dict("records")
    names, previous = [], BASE
    for row in rows:
        names.append((cell_label({**row, "kl_lambda": 1}, analysis.basis), "", row["method"] != previous))
        previous = row["method"]
    columns: list[Column] = [("λ", lambda row: Cell(f"{row['kl_lambda']:g}"))]
    for name in analysis.rewards:
        columns += [(name, lambda row, name=name: _number(row, name)), (f"{name}, gain", _gain(name))]
    columns += [
        ("Gain kept", _share),
        ("Diversity", lambda row: _number(row, "diversity")),
        ("Path KL", lambda row: _number(row, "path_kl")),
        *_cost_columns(rows, timed=analysis.timed),
        *_failure_column(rows),
        *_judge_columns(tuple(JUDGE_HEADS)),
    ]
    return _table(names, rows, columns)


def changes_table(comparison: Mapping[str, Any]) -> Table:
    """The lines that a verdict rests on, then and now."""
    parts = (("fronts", "front", "Reward space", False), ("methods", "method", "Gain kept", True))
    found = [(part, line) for part in parts for line in lines_of(comparison, part[0])]
    names = [
        (f"{title}: {method_label(line[key])}", "", place > 0 and found[place - 1][0] is not found[place][0])
        for place, ((_, key, title, _), line) in enumerate(found)
    ]
    rows = [{**line, "percent": part[3]} for part, line in found]
    return _table(names, rows, _change_columns())


def cells_table(comparison: Mapping[str, Any]) -> Table:
    """The rewards of single settings that differ clearly."""
    names, rows = [], []
    for cell in comparison.get("cells") or []:
        basis = list(cell["weights"])
        identity = {f"w_{name}": weight for name, weight in cell["weights"].items()}
        label = cell_label({**identity, "method": cell["method"], "kl_lambda": cell["kl_lambda"]}, basis)
        for reward, line in cell["rewards"].items():
            if line.get("verdict") in MARKS:
                names.append((f"{label}: {reward}", "", False))
                rows.append({**line, "percent": False})
    return _table(names, rows, _change_columns())


def _change_columns() -> list[Column]:
    return [
        ("Then", lambda row: Cell(*mean_and_interval(row["then"], row["percent"]))),
        ("Now", lambda row: Cell(*mean_and_interval(row["now"], row["percent"]))),
        ("Change", lambda row: Cell(change_in_words(row.get("change"), row["percent"]))),
        ("Verdict", lambda row: Cell(MARKS.get(row["verdict"], row["verdict"]), "", row["verdict"] in MARKS)),
    ]


def _members(analysis: Analysis, front: str) -> pd.DataFrame:
    summary = analysis.summary
    if front in (BASE, ADAPTERS_ALONE):
        return summary[summary["method"] == (BASE if front == BASE else ADAPTER)]
    method, _, anything = front.partition(", ")
    mine = summary[summary["method"] == method]
    return mine if anything else mine[mine["kl_lambda"] == 1]


def _means(cells: pd.DataFrame) -> dict[str, float]:
    names = ("rows", "decodes", "gradients", "seconds", "memory_mb", "binding_right")
    means = {name: float(cells[name].mean()) for name in names if name in cells}
    return {**means, "failed": float(cells["failed"].sum())}


def _cost_columns(rows: Sequence[Row], *, timed: bool) -> list[Column]:
    """Decodes and gradients are shown only where some method needs more of them than a plain image.

    Seconds only where they are the method's alone: which rows measured the path KL is known, how long they took is not.
    """
    searched = any((row.get("decodes") or 0) > 1 for row in rows)
    guided = any((row.get("gradients") or 0) > 0 for row in rows)
    return [
        ("UNet rows per image", lambda row: _number(row, "rows", 0)),
        *([("Decodes", lambda row: _number(row, "decodes", 0))] if searched else []),
        *([("Rows run backward", lambda row: _number(row, "gradients", 0))] if guided else []),
        *([("Seconds per image", lambda row: _number(row, "seconds", 2))] if timed else []),
        ("Memory, MB", lambda row: _number(row, "memory_mb", 0)),
    ]


def _failure_column(rows: Sequence[Row]) -> list[Column]:
    """Shown only where something failed."""
    return [("Failed images", lambda row: _number(row, "failed", 0))] if any(row["failed"] > 0 for row in rows) else []


def _judge_columns(names: Sequence[str]) -> list[Column]:
    return [(JUDGE_HEADS[name], lambda row, name=name: _percent(row, name)) for name in names]


def _number(row: Row, name: str, digits: int = 3) -> Cell:
    value = row.get(name, float("nan"))
    return MISSING if value is None or value != value else Cell(number(value, digits))


def _percent(row: Row, name: str) -> Cell:
    value = row.get(name, float("nan"))
    return MISSING if value != value else Cell(percent(value))


def _spanned(row: Row, name: str, words: Callable[[float], str] = number) -> Cell:
    value = row.get(name, float("nan"))
    if value != value:
        return MISSING
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low == high:
        return Cell(words(value))
    return Cell(words(value), span_percent(low, high) if words is percent else span(low, high))


def _share(row: Row) -> Cell:
    return _spanned(row, "share", percent)


def _ratio(row: Row) -> Cell:
    if row["front"] == ADAPTERS_ALONE:
        return Cell("× 1")
    if row["ratio"] != row["ratio"]:
        return MISSING
    return Cell(f"× {row['ratio']:.2f}", span(row["ratio_low"], row["ratio_high"], 2))


def _points(row: Row) -> Cell:
    value = row.get("difference", float("nan"))
    if value != value:
        return MISSING
    low, high = row["difference_low"] * 100, row["difference_high"] * 100
    return Cell(f"{_signed(value * 100, 1)} points", span(low, high, 1), low > 0 or high < 0)


def _signed_cell(row: Row, name: str, digits: int) -> Cell:
    value = row[name]
    if value != value:
        return MISSING
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return Cell(_signed(value, digits), span(low, high, digits), low > 0 or high < 0)


def _gain(reward: str) -> Callable[[Row], Cell]:
    return lambda row: MISSING if row["method"] == BASE else _signed_cell(row, f"{reward}_gain", 3)


def _signed(value: float, digits: int) -> str:
    return number(value, digits) if value < 0 else f"+{number(value, digits)}"
