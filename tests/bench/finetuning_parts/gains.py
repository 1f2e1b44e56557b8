"""From the histories of training runs to gains, in standard deviations of the base's held-out reward.

Intervals: 95 % of Student's t over the training seeds. All seeds are judged on the same held-out prompts and noise, so
that the error of having just these images is common to them and no part of that interval; it is given with each seed as
`gain_ci`, the half width of a 95 % interval over images (an upper bound: it takes no account of images being paired).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from blend.finetune.held_out import Metrics, published

History = Sequence[Metrics]


def gains_of(histories: Mapping[int, History], drawn_mean: float) -> dict[str, Any]:
    """The figures of one basis from its histories by seed: those of the adapters that are published.

    mean, low, high: the gain; drawings: that of real drawings, whose mean reward is drawn_mean; base_std in units of
    the reward; path_kl in nats, mean over seeds; diversity and the
    rewards that were watched, where the runs measured them, the latter in their own base deviations.
    """
    seeds = [seed_figures(seed, history) for seed, history in sorted(histories.items())]
    base = next(iter(histories.values()))[0]
    figures: dict[str, Any] = {
        **over_seeds([one["gain"] for one in seeds]),
        "drawings": (drawn_mean - base["held_out_mean"]) / deviation(base),
        "base_mean": base["held_out_mean"],
        "base_std": base["held_out_std"],
        "path_kl": mean([one["path_kl"] for one in seeds]),
        "seconds": mean([one["seconds"] for one in seeds]),
    }
    if base.get("held_out_diversity") is not None:
        figures["diversity"] = {
            "base": base["held_out_diversity"],
            "tuned": over_seeds([one["diversity"] for one in seeds]),
        }
    if base.get("watched"):
        figures["watched"] = {name: over_seeds([one["watched"][name] for one in seeds]) for name in base["watched"]}
    return {**figures, "per_seed": seeds}


def seed_figures(seed: int, history: History) -> dict[str, Any]:
    """One run's published adapter against its base."""
    base, tuned = history[0], published(history)
    alphas = [line["kl_weight"] for line in history if line["iteration"] <= tuned["iteration"] and "kl_weight" in line]
    figures = {
        "seed": seed,
        "gain": gain(base, tuned),
        "gain_ci": math.hypot(tuned["held_out_ci"], base["held_out_ci"]) / deviation(base),
        "path_kl": tuned["held_out_path_kl"],
        "kl_weight": alphas[-1] if alphas else None,
        "iteration": tuned["iteration"],
        "seconds": sum(line.get("seconds", 0.0) for line in history),
    }
    if history[-1].get("stopped"):
        figures["stopped"] = history[-1]["stopped"]
    if tuned.get("held_out_diversity") is not None:
        figures["diversity"] = tuned["held_out_diversity"]
    if tuned.get("watched"):
        before, now = base["watched"], tuned["watched"]
        figures["watched"] = {
            name: (now[name]["mean"] - before[name]["mean"]) / max(before[name]["std"], 1e-9) for name in now
        }
    return figures


def gain(base: Metrics, line: Metrics) -> float:
    """Rise of the held-out mean in base deviations."""
    return (line["held_out_mean"] - base["held_out_mean"]) / deviation(base)


def deviation(base: Metrics) -> float:
    return max(base["held_out_std"], 1e-9)


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95 % t interval; no interval from a single value."""
    if len(values) < 2:
        return {"mean": mean(values), "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": mean(values), "low": mean(values) - half, "high": mean(values) + half}


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def path_of(history: History) -> list[dict[str, float]]:
    """A run's held-out evaluations in their order: path_kl, gain and its held_out_ci."""
    base = history[0]
    return [
        {
            "iteration": line["iteration"],
            "path_kl": line["held_out_path_kl"],
            "gain": gain(base, line),
            "held_out_ci": line["held_out_ci"] / deviation(base),
        }
        for line in history
        if "held_out_mean" in line
    ]


def compare_objectives(histories: Mapping[str, Mapping[int, History]]) -> dict[str, Any]:
    """Objective -> seed -> history: each objective's paths, its end, and its gain at a KL that all runs reached.

    That KL is the lowest of the runs' highest; the gain there is read off the straight line between the first two
    evaluations of a run that lie on either side.
    """
    paths = {name: [path_of(history) for _, history in sorted(runs.items())] for name, runs in histories.items()}
    common = min(max(point["path_kl"] for point in path) for runs in paths.values() for path in runs)
    return {
        "common_path_kl": common,
        **{
            name: {
                "gain_at_common_kl": over_seeds([gain_at(path, common) for path in runs]),
                "final_gain": over_seeds([path[-1]["gain"] for path in runs]),
                "final_path_kl": mean([path[-1]["path_kl"] for path in runs]),
                "paths": runs,
            }
            for name, runs in paths.items()
        },
    }


def gain_at(path: Sequence[Mapping[str, float]], path_kl: float) -> float:
    """The gain where a run's path first comes to this KL."""
    for before, after in pairwise(path):
        if after["path_kl"] >= path_kl:
            share = (path_kl - before["path_kl"]) / (after["path_kl"] - before["path_kl"])
            return before["gain"] + share * (after["gain"] - before["gain"])
    raise ValueError(f"the run never came to a path KL of {path_kl:g} nats: choose one that it passed")
