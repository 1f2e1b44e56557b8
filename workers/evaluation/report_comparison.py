"""What a report says beside an earlier evaluation: the verdict, and what it rests on.

A report is written when its evaluation is done, and the comparison depends on what else lies in the store: it is put
into the finished page between marks that the template leaves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.comparing import in_words
from workers.evaluation.labels import method_label, number, percent
from workers.evaluation.plots import BLENDS
from workers.evaluation.plots_drift import drift_png, lines_of
from workers.evaluation.report_alts import drift_alt
from workers.evaluation.report_pages import Chart, embed, environment
from workers.evaluation.report_tables import cells_table, changes_table
from workers.evaluation.report_words import count
from workers.evaluation.style import DARK, LIGHT

Line = Mapping[str, Any]
REGIONS = ("verdict", "contents", "changes")
TITLES = {
    "improvement": ("better", "▲", "Better than {role}"),
    "regression": ("worse", "▼", "Worse than {role}"),
    "no clear difference": ("alike", "=", "No clear difference from {role}"),
    "not compared": ("unknown", "?", "Nothing to compare it with yet"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to `is it better?`; `kind` is better, worse, alike or unknown."""

    kind: str
    mark: str
    title: str
    against: str
    sentences: tuple[str, ...]


def regions(comparison: Mapping[str, Any] | None, level: str) -> dict[str, str]:
    """The HTML of each region of the page that tells of the comparison; empty without one."""
    if not comparison:
        return dict.fromkeys(REGIONS, "")
    parts: Any = environment().get_template("report_comparison.html.j2").module
    written = {"verdict": str(parts.verdict(verdict(comparison, level))), "contents": "", "changes": ""}
    light, dark = drift_png(comparison, LIGHT), drift_png(comparison, DARK)
    if not (light and dark and comparison.get("against")):
        return written
    changes = parts.changes(
        comparison.get("changed") or [],
        embed(Chart(light, dark)),
        drift_alt(comparison),
        changes_table(comparison),
        cells_table(comparison),
        comparison["against"],
        level,
    )
    return {**written, "contents": str(parts.contents()), "changes": str(changes)}


def insert(page: str, comparison: Mapping[str, Any], level: str) -> str:
    """The finished page with this comparison in the place of any other; `level` is what the intervals cover."""
    for name, html in regions(comparison, level).items():
        mark = re.compile(rf"(<!-- {name} -->).*?(<!-- end of {name} -->)", re.DOTALL)
        page = mark.sub(lambda found, html=html: f"{found[1]}{html}{found[2]}", page)
    return page


def verdict(comparison: Mapping[str, Any] | None, level: str) -> Verdict | None:
    """Better or worse than what, by how much and how sure; `level` is the coverage of the intervals in words."""
    if not comparison:
        return None
    kind, mark, title = TITLES[comparison.get("verdict") or "not compared"]
    against = comparison.get("against")
    if not against:
        return Verdict("unknown", *TITLES["not compared"][1:], "", tuple(comparison.get("sentences") or ()))
    lines = [(part, line) for part in ("fronts", "methods") for line in lines_of(comparison, part)]
    sentences = [*_deciding(lines, kind), *_how_sure(lines, kind, level), *_cost(comparison)]
    where = f"{against.get('bundle')}, evaluated {str(against.get('date'))[:10]}"
    return Verdict(kind, mark, title.format(role=against.get("role") or "before"), where, tuple(sentences))


def _deciding(lines: Sequence[tuple[str, Line]], kind: str) -> list[str]:
    """The first front that the verdict rests on, or just the first where none is clear; and the first share."""
    told = []
    for part in ("fronts", "methods"):
        mine = [line for of, line in lines if of == part]
        # a blend says more of the bundle than its adapters alone
        mine.sort(key=lambda line: line.get("method", line.get("front")) not in BLENDS)
        if part == "fronts":
            mine = [line for line in mine if kind == "alike" or line.get("verdict") == kind]
        told += [_told(part, line) for line in mine[:1]]
    return told


def _told(part: str, line: Line) -> str:
    then, now = line["then"], line["now"]
    if part == "methods":
        points = (now["mean"] - then["mean"]) * 100
        more = f"{abs(points):.1f} points {'more' if points >= 0 else 'less'}"
        kept = f"Gain kept by {method_label(line['method'])}: {in_words(now, True)} after {in_words(then, True)}"
        return f"{kept}, {more}."
    change = abs(now["mean"] / then["mean"] - 1) if then["mean"] else float("nan")
    more = f"{percent(change)} {'more' if now['mean'] >= then['mean'] else 'less'}"
    more = "nearly the same" if change < 0.005 else more
    return f"Reward space reached, {method_label(line['front'])}: {in_words(now)} after {in_words(then)}, {more}."


def _how_sure(lines: Sequence[tuple[str, Line]], kind: str, level: str) -> list[str]:
    """What the verdict rests on, which is the fronts, and whether the shares say otherwise."""
    found = {part: [line.get("verdict") for of, line in lines if of == part] for part in ("fronts", "methods")}
    total, interval = len(found["fronts"]), f"the old {level} interval"
    clear = [f"{found['fronts'].count(word)} clearly {word}" for word in ("better", "worse")]
    rests = f"The verdict rests on {count(total, 'reward space', 'reward spaces')}"
    if kind == "alike":
        sure = [f"{rests}: in none does the new mean lie clearly outside of {interval}; it may be chance."]
    else:
        sure = [f"{rests}, {' and '.join(clear)}: there the new mean lies outside of {interval}."]
    shares = [f"{found['methods'].count(word)} {word}" for word in ("better", "worse") if word in found["methods"]]
    if shares:
        sure.append(f"Of the shares kept, {' and '.join(shares)}; being relative to the adapters, they decide nothing.")
    return sure


def _cost(comparison: Mapping[str, Any]) -> list[str]:
    """What an image of the first method costs, where it is another number of rows than before."""
    for line in comparison.get("methods") or []:
        then, now = ((line.get("rows") or {}).get(side) for side in ("then", "now"))
        if then and now:
            label = method_label(line["method"])
            if abs(now / then - 1) < 0.005:
                return [f"An image of {label} costs as much as before: {number(now, 0)} UNet rows."]
            more = f"{percent(abs(now / then - 1))} {'more' if now > then else 'less'}"
            rows = f"{number(now, 0)} UNet rows after {number(then, 0)}"
            return [f"An image of {label} costs {more} than before: {rows}."]
    return []
