"""From a finished evaluation to the figures of the headline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Span = dict[str, float]


def read_evaluation(directory: Path) -> dict[str, Any]:
    """Shares of the oracle's gain by method and preference, reach, cost and fidelity, each with its interval."""
    summary = json.loads((directory / "summary.json").read_text())
    basis = list(summary["facts"]["adapters"])
    plain = [row for row in summary["oracles"] if row["kl_lambda"] == 1]
    return {
        "prompts": len(summary["facts"]["prompts"]),
        "seeds": len(summary["facts"]["seeds"]),
        "settings": summary["facts"]["cells"],
        "share_of_oracle": _shares(plain, summary["rivals"], basis),
        "weighted_gain": _by_preference(plain, "weighted_gain", basis),
        "difference_to_mpa": {
            row["method"]: _span(row, "difference") for row in summary["rivals"] if row["method"] != "mpa"
        },
        "hypervolume": {row["front"]: _span(row, "hypervolume") for row in summary["hypervolumes"]},
        "igd": {row["front"]: _span(row, "igd") for row in summary["hypervolumes"]},
        **{
            f"{name}_per_image": {row["method"]: row[name] for row in summary["rivals"]}
            for name in ("rows", "decodes", "gradients", "seconds")
        },
        "memory_mb": {row["method"]: row["memory_mb"] for row in summary["rivals"]},
        "binding_right": {row["method"]: row["binding_right"] for row in [*summary["cells"][:1], *summary["rivals"]]},
        "diversity": {row["method"]: row["diversity"] for row in [*summary["cells"][:1], *summary["rivals"]]},
        "kla_gap": _strengths(summary["oracles"]),
    }


def preference(row: Row, basis: Sequence[str]) -> str:
    """A mix in a few characters: `colourfulness .5 compressibility .5`."""
    weights = {name: row[f"w_{name}"] for name in basis if row[f"w_{name}"]}
    return " ".join(f"{name} {weight:.2g}" for name, weight in weights.items())


def _span(row: Row, name: str) -> Span:
    return {"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}


def _by_preference(rows: Sequence[Row], name: str, basis: Sequence[str]) -> dict[str, dict[str, Span]]:
    found: dict[str, dict[str, Span]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[preference(row, basis)] = _span(row, name)
    return found


def _shares(rows: Sequence[Row], rivals: Sequence[Row], basis: Sequence[str]) -> dict[str, dict[str, Span]]:
    shares = _by_preference(rows, "share_of_oracle", basis)
    for row in rivals:
        shares.setdefault(row["method"], {})["all"] = _span(row, "share_of_oracle")
    return shares


def _strengths(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """lambda -> DB-KLA's gain and that of the model retrained at alpha / lambda, and how they differ."""
    return {
        f"{row['kl_lambda']:g}": {
            "gain": _span(row, "weighted_gain"),
            "retrained_gain": row["oracle_gain"],
            "share": _span(row, "share_of_oracle"),
            "gap": _span(row, "gap"),
        }
        for row in rows
        if row["kl_lambda"] != 1 and row["method"] == "mpa"
    }
