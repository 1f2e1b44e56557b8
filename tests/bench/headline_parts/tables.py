"""From a finished evaluation to the figures of the headline."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from evaluations import Span, span

Row = dict[str, Any]


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
            row["method"]: span(row, "difference") for row in summary["rivals"] if row["method"] != "mpa"
        },
        "hypervolume": {row["front"]: span(row, "hypervolume") for row in summary["hypervolumes"]},
        "igd": {row["front"]: span(row, "igd") for row in summary["hypervolumes"]},
        **{
            f"{name}_per_image": {row["method"]: row[name] for row in summary["rivals"]}
            for name in ("rows", "decodes", "gradients", "seconds")
        },
        "memory_mb": {row["method"]: row["memory_mb"] for row in summary["rivals"]},
        "binding_right": {row["method"]: row["binding_right"] for row in [*summary["cells"][:1], *summary["rivals"]]},
        "diversity": {row["method"]: row["diversity"] for row in [*summary["cells"][:1], *summary["rivals"]]},
        "kla_gap": _strengths(summary["oracles"]),
    }


def read_grid(directory: Path) -> dict[str, Any]:
    """Reach of each method over the grids of weights, the share of the adapters' gains it keeps, and gain by lambda."""
    summary = json.loads((directory / "summary.json").read_text())
    basis = list(summary["facts"]["adapters"])
    strengths: dict[str, dict[str, Span]] = {}
    for row in summary["cells"]:
        if row["method"] in ("mpa", "adapter") and row["kl_lambda"]:
            strengths.setdefault(preference(row, basis), {})[f"{row['kl_lambda']:g}"] = span(row, "weighted_gain")
    return {
        "prompts": len(summary["facts"]["prompts"]),
        "seeds": len(summary["facts"]["seeds"]),
        "settings": summary["facts"]["cells"],
        "hypervolume": {row["front"]: span(row, "hypervolume") for row in summary["hypervolumes"]},
        "share_of_adapters": {row["method"]: span(row, "share") for row in summary["methods"]},
        "gain_by_lambda": {mixed: gains for mixed, gains in strengths.items() if len(gains) > 1},
    }


def preference(row: Row, basis: Sequence[str]) -> str:
    """A mix in a few characters: `colourfulness .5 compressibility .5`."""
    return mix({name: row[f"w_{name}"] for name in basis})


def mix(weights: Mapping[str, float]) -> str:
    """The same of weights by adapter; both parts of the benchmark go by these names."""
    return " ".join(f"{name} {weight:.2g}" for name, weight in weights.items() if weight)


def _by_preference(rows: Sequence[Row], name: str, basis: Sequence[str]) -> dict[str, dict[str, Span]]:
    found: dict[str, dict[str, Span]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[preference(row, basis)] = span(row, name)
    return found


def _shares(rows: Sequence[Row], rivals: Sequence[Row], basis: Sequence[str]) -> dict[str, dict[str, Span]]:
    shares = _by_preference(rows, "share_of_oracle", basis)
    for row in rivals:
        shares.setdefault(row["method"], {})["all"] = span(row, "share_of_oracle")
    return shares


def _strengths(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """lambda -> DB-KLA's gain and that of the model retrained at alpha / lambda, and how they differ."""
    return {
        f"{row['kl_lambda']:g}": {
            "gain": span(row, "weighted_gain"),
            "retrained_gain": row["oracle_gain"],
            "share": span(row, "share_of_oracle"),
            "gap": span(row, "gap"),
        }
        for row in rows
        if row["kl_lambda"] != 1 and row["method"] == "mpa"
    }


def read_strength(directory: Path) -> dict[str, Any]:
    """For each mix, gain and path KL of oracle and blends, and the share of its gain at the path KL that it has."""
    summary = json.loads((directory / "summary.json").read_text())
    basis = list(summary["facts"]["adapters"])
    found: dict[str, Any] = {
        "prompts": len(summary["facts"]["prompts"]),
        "seeds": len(summary["facts"]["seeds"]),
    }
    mixes = [row for row in summary["cells"] if sum(bool(row[f"w_{name}"]) for name in basis) > 1]
    for oracle in (row for row in mixes if row["method"] == "oracle"):
        same = [row for row in mixes if all(row[f"w_{name}"] == oracle[f"w_{name}"] for name in basis)]
        points = {f"{row['method']} lambda {row['kl_lambda']:g}": _point(row) for row in same}
        sweep = sorted((row for row in same if row["method"] == "mpa"), key=lambda row: row["path_kl"])
        at = [(0.0, 0.0), *((row["path_kl"], row["weighted_gain"]) for row in sweep)]
        points["share at the oracle's path KL"] = _at(oracle["path_kl"], at) / oracle["weighted_gain"]
        found[preference(oracle, basis)] = points
    return found


def _point(row: Row) -> dict[str, Any]:
    return {"gain": span(row, "weighted_gain"), "path_kl": row["path_kl"], "binding_right": row["binding_right"]}


def _at(kl: float, points: Sequence[tuple[float, float]]) -> float:
    """The gain at a path KL, on straight lines between the square roots of those measured; the last one beyond."""
    for (low, less), (high, more) in pairwise(points):
        if kl <= high:
            return less + (more - less) * (kl**0.5 - low**0.5) / (high**0.5 - low**0.5)
    return points[-1][1]
