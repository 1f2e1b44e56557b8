"""An evaluation beside an earlier one, as plain JSON: what got better, what got worse, and by how much.

A comparison has these keys; figures are null where a summary has none.

    schema_version  1
    verdict         "regression", "improvement", "no clear difference" or "not compared"
    sentences       what it is compared with and what follows, in words, in the order to be shown
    changed         in words, what differs between the two bundles; empty where nothing does
    now             bundle, bundle_digest, digest (of the evaluation), date
    against         the same of the earlier one, and its role, such as "the champion"; null when not compared
    fronts          [{front, then, now, change, verdict}]: hypervolumes
    methods         [{method, then, now, change, verdict, rows: {then, now}, seconds: {then, now}}]: share of the gain,
                    and the cost of an image, averaged over the method's mixes at lambda 1; seconds are null where
                    they hold what measuring the path KL took
    cells           [{method, weights: {adapter: weight}, kl_lambda, rewards: {reward: {then, now, change, verdict}}}]

`then` and `now` of a line are {mean, low, high}; `change` is now.mean - then.mean. Only what both measured is there:
fronts and methods over one grid of mixes, cells of the same method, weights and kl_lambda. The base's front, oracles
and rivals are no fronts or methods of the bundle, and left out.

A line is worse when its new mean lies below the old interval; better, for which more is asked, when its new mean lies
above the old interval and the old mean below the new one; "not known" when a figure is missing. Both evaluations have
the same prompts and seeds and so err alike, which makes this rarer by chance than it is between independent figures:
between those, of equal width, it asks for a difference of 1.4 standard errors.

The verdict rests on the fronts: a regression as soon as one is worse, an improvement when none is and one is better.
The gate before a promotion asks the same function, `decide`, of the same fronts. What else is told decides nothing: a
share is relative to the adapters' own gains, so it may fall while the hypervolume grows, when new adapters are
stronger; and of so many cells, some differ by chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from infra.manifests import BundleDefaults, BundleRecord

SCHEMA_VERSION = 1
REGRESSION, IMPROVEMENT, UNCLEAR, NOT_COMPARED = "regression", "improvement", "no clear difference", "not compared"
BETTER, WORSE, UNKNOWN = "better", "worse", "not known"
ADAPTERS_ALONE = "adapters alone"
DEFAULTS = tuple(BundleDefaults.model_fields)

Summary = Mapping[str, Any]
Json = dict[str, Any]


def compare(now: Summary, then: Summary | None, role: str = "", changed: Sequence[str] = ()) -> Json:
    """The comparison of two summaries that answer the same question; `then` None, or without a common front, is not
    compared.
    """
    fronts, methods = ([], []) if then is None else (common_fronts(now, then), _methods(now, then))
    document = {"schema_version": SCHEMA_VERSION, "now": identity(now)}
    if then is None or not fronts:
        nothing = {"verdict": NOT_COMPARED, "sentences": [_not_compared(now)], "changed": [], "against": None}
        return document | nothing | {"fronts": [], "methods": [], "cells": []}
    against = identity(then) | {"role": role}
    found = {"verdict": decide(fronts), "changed": list(changed), "against": against}
    lines = {"fronts": fronts, "methods": methods, "cells": _cells(now, then)}
    return document | found | lines | {"sentences": _sentences(against, lines)}


def decide(fronts: Sequence[Json]) -> str:
    """Whether a bundle got better or worse, by the fronts that both evaluations have (see common_fronts)."""
    if not fronts:
        return NOT_COMPARED
    verdicts = {line["verdict"] for line in fronts}
    return REGRESSION if WORSE in verdicts else IMPROVEMENT if BETTER in verdicts else UNCLEAR


def identity(summary: Summary) -> Json:
    """Which evaluation a summary is of."""
    facts = summary["facts"]
    return {key: facts.get(key) for key in ("bundle", "bundle_digest", "digest", "date")}


def verdict_of(then: Mapping[str, float | None], now: Mapping[str, float | None]) -> str:
    """How a figure, {mean, low, high}, differs from an earlier one; more is better."""
    old, old_low, old_high = (then[key] for key in ("mean", "low", "high"))
    new, low, high = (now[key] for key in ("mean", "low", "high"))
    if old is None or new is None or old_low is None or old_high is None or low is None or high is None:
        return UNKNOWN
    if new < old_low:
        return WORSE
    if new > old_high and old < low:
        return BETTER
    return UNCLEAR


def in_words(figure: Mapping[str, float | None], percent: bool = False) -> str:
    """A mean and its interval, such as `46.6 (37.5 to 56.8)`."""
    mean, interval = mean_and_interval(figure, percent)
    return f"{mean} ({interval})" if interval else mean


def mean_and_interval(figure: Mapping[str, float | None], percent: bool = False) -> tuple[str, str]:
    """The same in two parts, the second empty where no interval is known."""
    mean, low, high = (figure.get(key) for key in ("mean", "low", "high"))
    if mean is None:
        return UNKNOWN, ""
    scale, unit = (100, " %") if percent else (1, "")
    interval = "" if low is None or high is None else f"{short(low * scale)} to {short(high * scale)}"
    return f"{short(mean * scale)}{unit}", interval


def change_in_words(change: float | None, percent: bool = False) -> str:
    """A difference of two means, such as `+3` or `-1.25 points`."""
    if change is None:
        return UNKNOWN
    return f"{short(change * 100, '+')} points" if percent else short(change, "+")


def short(value: float | None, sign: str = "") -> str:
    """Three digits, or all before the point: `0.0123`, `12.3`, `1,234`; with `sign` "+" also of what is above 0."""
    if value is None:
        return UNKNOWN
    return f"{value:{sign},.0f}" if abs(value) >= 999.5 else f"{value:{sign}.3g}"


def rows(comparison: Mapping[str, Any]) -> list[dict[str, str]]:
    """The fronts, which the verdict rests on, and the methods, for people: what, then, now, change, verdict."""
    lines = [(f"hypervolume of {line['front']}", line, False) for line in comparison["fronts"]]
    lines += [(f"share of the gain, {line['method']}", line, True) for line in comparison["methods"]]
    return [
        {
            "what": what,
            "then": in_words(line["then"], percent),
            "now": in_words(line["now"], percent),
            "change": change_in_words(line["change"], percent),
            "verdict": line["verdict"],
        }
        for what, line, percent in lines
    ]


def changes(then: BundleRecord, now: BundleRecord) -> list[str]:
    """What is different about a bundle, in words; nothing for the same bundle."""
    names = sorted({*then.adapters, *now.adapters})
    pairs = [(f"adapter {name}", _ref(then, name), _ref(now, name)) for name in names]
    pairs += [(f"default {key}", getattr(then.defaults, key), getattr(now.defaults, key)) for key in DEFAULTS]
    return [f"{what}: {old} became {new}" for what, old, new in pairs if old != new]


def common_fronts(now: Summary, then: Summary) -> list[Json]:
    """The fronts over one grid of mixes that both have, as in the comparison."""
    earlier = {row["front"]: row for row in then["hypervolumes"]}
    return [
        {"front": row["front"]} | _line(earlier[row["front"]], row, "hypervolume")
        for row in now["hypervolumes"]
        if row["front"] in earlier and is_own(row["front"], now) and _same_grid(row["front"], now, then)
    ]


def _methods(now: Summary, then: Summary) -> list[Json]:
    earlier = {row["method"]: row for row in then.get("methods", [])}
    return [
        {"method": row["method"]} | _line(earlier[row["method"]], row, "share") | _cost(row["method"], now, then)
        for row in now.get("methods", [])
        if row["method"] in earlier and is_own(row["method"], now) and _same_grid(row["method"], now, then)
    ]


def _cells(now: Summary, then: Summary) -> list[Json]:
    earlier = {_key(cell): cell for cell in then["cells"]}
    return [
        {
            "method": cell["method"],
            "weights": dict(_key(cell)[1]),
            "kl_lambda": cell["kl_lambda"],
            "rewards": {name: _line(earlier[_key(cell)], cell, name) for name in now["facts"]["rewards"]},
        }
        for cell in now["cells"]
        if _key(cell) in earlier
    ]


def is_own(front: str, summary: Summary) -> bool:
    """Whether the bundle is blended in this way: base, oracles and rivals say nothing of it."""
    methods = summary.get("config", {}).get("methods")
    name = front.partition(", ")[0]
    return name != "base" and (methods is None or name == ADAPTERS_ALONE or name in methods)


def _same_grid(front: str, now: Summary, then: Summary) -> bool:
    """Whether a front, `mpa` at lambda 1 or `mpa, any lambda`, has the same mixes in both: more of them reach more."""
    return set(_members(front, now)) == set(_members(front, then))


def _members(front: str, summary: Summary) -> dict[Any, Json]:
    method, _, dial = front.partition(", ")
    return {
        _key(cell): cell
        for cell in summary.get("cells", [])
        if cell["method"] == ("adapter" if method == ADAPTERS_ALONE else method) and (dial or cell["kl_lambda"] == 1)
    }


def _key(cell: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, float], ...], float]:
    weights = {name.removeprefix("w_"): weight for name, weight in cell.items() if name.startswith("w_")}
    return cell["method"], tuple(sorted(weights.items())), cell["kl_lambda"]


def _line(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> Json:
    old, new = (_figure(row, name) for row in (then, now))
    change = None if old["mean"] is None or new["mean"] is None else new["mean"] - old["mean"]
    return {"then": old, "now": new, "change": change, "verdict": verdict_of(old, new)}


def _figure(row: Mapping[str, Any], name: str) -> dict[str, float | None]:
    return {"mean": row.get(name), "low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}


def _cost(method: str, now: Summary, then: Summary) -> Json:
    sides = {"then": then, "now": now}
    rows = {side: _mean(_members(method, summary), "rows") for side, summary in sides.items()}
    seconds = {
        side: None if summary["facts"].get("path_kl") else _mean(_members(method, summary), "seconds")
        for side, summary in sides.items()
    }
    return {"rows": rows, "seconds": seconds}


def _mean(cells: Mapping[Any, Json], name: str) -> float | None:
    known = [cell[name] for cell in cells.values() if cell.get(name) is not None]
    return sum(known) / len(known) if known else None


def _not_compared(now: Summary) -> str:
    name = now["facts"]["bundle"].partition("@")[0]
    return f"Not compared: no earlier evaluation of a champion of {name} asked the same."


def _sentences(against: Json, lines: Json) -> list[str]:
    short = str(against["digest"])[:12]
    sentences = [f"Compared with {against['bundle']}, {against['role']} (evaluation {short} of {against['date']})."]
    for verdict, word in ((WORSE, "Worse"), (BETTER, "Better")):
        found = [row for row in rows(lines) if row["verdict"] == verdict]
        if found:
            told = "; ".join(f"{row['what']}, {row['now']} after {row['then']}" for row in found)
            sentences.append(f"{word}: {told}.")
    if {line["verdict"] for line in lines["methods"]} & {WORSE, BETTER}:
        sentences.append("The verdict rests on the hypervolumes: shares are relative to the adapters' own gains.")
    if len(sentences) == 1:
        sentences.append("No hypervolume and no share of the adapters' gains differs clearly.")
    return sentences


def _ref(bundle: BundleRecord, basis: str) -> str:
    link = bundle.adapters.get(basis)
    return link.ref if link else "none"
