"""What people call a method, a preference and a reward in figures and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infra.comparing import ADAPTERS_ALONE
from workers.evaluation.grid import ADAPTER, BASE, ORACLE
from workers.evaluation.rivals import rival_of

METHODS = {
    BASE: "Base model",
    ADAPTER: "Adapter alone",
    ADAPTERS_ALONE: "Adapters alone",
    "mpa": "Blend (MPA)",
    "ls": "Sampled blend (LS)",
    "soup": "Weight average (soup)",
    "staged": "Staged blend",
    "cached": "Cached blend",
    ORACLE: "Retrained (oracle)",
    "switch": "LoRA Switch",
    "composite": "LoRA Composite",
}
EXPLANATIONS = {
    BASE: "The model before any tuning.",
    ADAPTERS_ALONE: "Pick one tuned model; no mixing.",
    "mpa": "Mixes the adapters' predictions at every step. Most faithful; cost grows with the adapters in use.",
    "ls": "Draws one adapter per step in proportion to the weights. The cost of a single model.",
    "soup": "Averages the adapters' weights once. The cost of a single model; the usual shortcut.",
    "staged": "Blends predictions in the first steps, where it matters, and weights after. The cost of a single model.",
    "cached": "Averages the adapters' weights and adds what that lacked of the blend a few steps ago.",
    ORACLE: "A model tuned for exactly this preference: a training for each, and what the others are measured against.",
    "switch": "Takes the adapters in turn, step by step; it has no weights. The cost of a single model.",
    "composite": "Averages the adapters' predictions evenly at every step; it has no weights. Costs all adapters.",
}
# Rivals with numbers in their names: label and explanation of those numbers.
FAMILIES = {
    "best_of": ("Best of {0:g}", "Draws {0:g} images and keeps the one that scores best. The cost of {0:g} models."),
    "code": (
        "CoDe (N = {0:g}, block {1:g})",
        "Draws {0:g} candidates every {1:g} steps and goes on with the one that scores best. The cost of {0:g} models.",
    ),
    "rgg": (
        "Reward guidance (RGG, scale {0:g})",
        "Pushes every step along the rewards' gradient, {0:g} times. A model's cost, and a backward pass at each step.",
    ),
}


def method_label(method: str) -> str:
    """A method's or front's name, also `mpa, any lambda`."""
    name, _, rest = method.partition(", ")
    label = METHODS.get(name) or _of_family(name, 0) or name
    return f"{label}, any λ" if rest == "any lambda" else label


def explanation(method: str) -> str:
    """What a method or front does and costs, in a sentence or two; nothing for one that is unknown."""
    if method.endswith(", any lambda"):
        return "With λ as a second dial."
    return EXPLANATIONS.get(method) or _of_family(method, 1)


def _of_family(method: str, part: int) -> str:
    rival = rival_of(method)
    return FAMILIES[rival.kind][part].format(*rival.numbers) if rival and rival.kind in FAMILIES else ""


def preference_label(row: Mapping[str, Any], basis: Sequence[str]) -> str:
    """The mix alone: `colourfulness 20 % + compressibility 80 %`."""
    weights = {name: float(row[f"w_{name}"]) for name in basis if row[f"w_{name}"] > 0}
    if not weights:
        return "no adapter"
    if len(weights) == 1:
        return f"{next(iter(weights))} alone"
    if len(weights) > 2 and max(weights.values()) - min(weights.values()) < 1e-6:
        return f"all {len(weights)} equally"
    return " + ".join(f"{name} {weight * 100:.3g} %" for name, weight in weights.items())


def dial_label(row: Mapping[str, Any]) -> str:
    """The strength where it is not the usual 1."""
    return "" if row["kl_lambda"] in (0, 1) else f"λ {row['kl_lambda']:g}"


def cell_label(row: Mapping[str, Any], basis: Sequence[str]) -> str:
    """Method, mix and strength in one line."""
    if row["method"] == BASE:
        return METHODS[BASE]
    parts = [method_label(row["method"]), preference_label(row, basis), dial_label(row)]
    if row["method"] == ADAPTER:
        parts = [preference_label(row, basis)]
    return " · ".join(part for part in parts if part)


def number(value: float, digits: int = 3) -> str:
    """Short and readable; a real minus sign, a dash for what is undefined."""
    if value != value:
        return "–"
    magnitude = abs(value)
    if digits and 1e-6 < magnitude < 0.5 * 10**-digits:
        return f"{value:.1g}".replace("-", "−", 1) if magnitude >= 1e-4 else f"{value:.0e}".replace("-", "−")
    decimals = min(digits, 0 if magnitude >= 1000 else 1 if magnitude >= 100 else 2 if magnitude >= 10 else digits)
    return f"{value:,.{decimals}f}".replace("-", "−")


def span(low: float, high: float, digits: int = 3) -> str:
    """An interval as people read it."""
    return "" if low != low else f"{number(low, digits)} to {number(high, digits)}"


def percent(value: float) -> str:
    """A share as a whole percentage."""
    return "–" if value != value else f"{value * 100:.0f} %".replace("-", "−")
