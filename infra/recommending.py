"""Weights and lambda that an evaluation speaks for, as ranges that a bundle recommends to its users."""

from collections.abc import Mapping, Sequence
from typing import Any

from infra.errors import RegistryError
from infra.manifests import Range

# A dial is recommended as far as images of one prompt still differ by this share of what the base's do.
DIVERSITY_KEPT = 0.5


def weight_ranges(summary: Mapping[str, Any], method: str) -> dict[str, Range]:
    """Basis name -> the weights of mixes that no other measured mix of `method`, or adapter alone, beats in every
    reward. Raises RegistryError where the evaluation measured none.
    """
    names = list(summary["facts"]["adapters"])
    rewards = list(summary["facts"]["rewards"])
    cells = [cell for cell in summary["cells"] if cell["kl_lambda"] == 1 and cell["method"] in (method, "adapter")]
    if not any(cell["method"] == method for cell in cells):
        measured = ", ".join(sorted({cell["method"] for cell in summary["cells"]}))
        raise RegistryError(f"the evaluation has no mix of method {method!r}, it measured: {measured}")
    best = [cell for cell in cells if not any(_beats(other, cell, rewards) for other in cells)]
    return {
        name: Range(low=min(cell[f"w_{name}"] for cell in best), high=max(cell[f"w_{name}"] for cell in best))
        for name in names
    }


def lambda_range(summary: Mapping[str, Any], method: str) -> Range:
    """From 0, the base, to the largest measured lambda at which the preferred rewards still rise and images of one
    prompt still differ, for every mix of `method` that was measured at several.
    """
    base = next(cell for cell in summary["cells"] if cell["method"] == "base")
    names = list(summary["facts"]["adapters"])
    dials: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for cell in summary["cells"]:
        if cell["method"] == method and cell["weighted_gain"] is not None:
            dials.setdefault(tuple(cell[f"w_{name}"] for name in names), []).append(cell)
    reach = [_reach(sorted(dial, key=_strength), base["diversity"]) for dial in dials.values() if len(dial) > 1]
    return Range(low=0.0, high=min(reach, default=1.0))


def _reach(dial: Sequence[Mapping[str, Any]], base_diversity: float) -> float:
    """The last lambda before the gain falls clearly below an earlier one, or diversity below what is kept."""
    reached, best = 0.0, float("-inf")
    for cell in dial:
        if cell["weighted_gain_high"] < best or cell["diversity"] < DIVERSITY_KEPT * base_diversity:
            break
        reached, best = float(cell["kl_lambda"]), max(best, float(cell["weighted_gain_low"]))
    return reached


def _strength(cell: Mapping[str, Any]) -> float:
    return float(cell["kl_lambda"])


def _beats(one: Mapping[str, Any], other: Mapping[str, Any], rewards: Sequence[str]) -> bool:
    return all(one[name] >= other[name] for name in rewards) and any(one[name] > other[name] for name in rewards)
