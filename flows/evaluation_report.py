"""An evaluation for people who look at Prefect: what changed, is it better, by how much, how sure, at what cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infra.comparing import BETTER, NOT_COMPARED, WORSE, change_in_words, in_words, rows, short

Json = Mapping[str, Any]


def markdown(summary: Json, comparison: Json, promotion: Json | None, location: str) -> str:
    """The headline, the comparison with the champion, what became of the bundle, and what it all rests on."""
    facts = summary["facts"]
    parts = [f"# Evaluation of {facts['bundle']}", *summary["headline"], *_compared(comparison), *_promoted(promotion)]
    return "\n\n".join(
        [
            *parts,
            f"{len(facts['prompts'])} prompts × {len(facts['seeds'])} seeds × {facts['cells']} settings, "
            f"{facts['steps']} steps, guidance {facts['guidance']}. Files: `{location}`",
        ]
    )


def comparison_table(comparison: Json) -> list[dict[str, str]]:
    """Every line of a comparison: fronts, methods, and each reward of each cell."""
    if comparison["verdict"] == NOT_COMPARED:
        return [{"what": comparison["sentences"][0]}]
    return rows(comparison) + [
        {
            "what": f"{reward}: {_cell_name(cell)}",
            "then": in_words(line["then"]),
            "now": in_words(line["now"]),
            "change": change_in_words(line["change"]),
            "verdict": line["verdict"],
        }
        for cell in comparison["cells"]
        for reward, line in cell["rewards"].items()
    ]


def condensed(comparison: Json) -> dict[str, Any]:
    """What a comparison comes to: the sentences, and the lines that are clearly better or worse."""
    found = rows(comparison)
    return {
        "against": comparison["against"],
        "sentences": comparison["sentences"],
        "worse": [row for row in found if row["verdict"] == WORSE],
        "better": [row for row in found if row["verdict"] == BETTER],
    }


def _compared(comparison: Json) -> list[str]:
    if comparison["verdict"] == NOT_COMPARED:
        return comparison["sentences"]
    changed = [f"- {change}" for change in comparison["changed"]] or ["- nothing in the bundle"]
    cost = [
        (line["method"], *(short(line[name][when]) for name in ("rows", "seconds") for when in ("then", "now")))
        for line in comparison["methods"]
        if None not in line["rows"].values()
    ]
    return [
        f"## Against {comparison['against']['bundle']}: {comparison['verdict']}",
        *comparison["sentences"],
        "What changed:\n" + "\n".join(changed),
        _table(("", "then", "now", "change", "verdict"), (row.values() for row in rows(comparison))),
        "Intervals are those of the evaluations. Worse: the new mean lies below the old interval. Better: it lies "
        "above it, and the old mean below the new interval. Hypervolumes decide, also whether it may be promoted.",
        "Cost of an image at lambda 1, in UNet rows and seconds:" if cost else "",
        _table(("", "rows then", "rows now", "seconds then", "seconds now"), cost) if cost else "",
    ]


def _promoted(promotion: Json | None) -> list[str]:
    if promotion is None:
        return []
    return [f"**{'It is the champion now' if promotion['promoted'] else 'Not promoted'}:** {promotion['reason']}"]


def _table(head: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _cell_name(cell: Json) -> str:
    mix = ", ".join(f"{name} {weight:g}" for name, weight in cell["weights"].items() if weight)
    return " ".join(filter(None, [cell["method"], f"at {mix}," if mix else "", f"lambda {cell['kl_lambda']:g}"]))
