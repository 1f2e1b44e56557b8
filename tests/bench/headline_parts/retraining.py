"""How far models retrained for one preference differ, and what the blend is worth beside each of them.

A training that ends before alpha decides how far it goes is one of several answers to the same preference. Beside the
oracle of the headline there are its twins of other seeds, which say how far retraining itself varies, and one held to
half its path KL, which says what can be had nearer the base.
"""

import json
from typing import Any

from evaluations import run, span

from workers.bundles import find_record
from workers.evaluation import EvaluateConfig
from workers.evaluation.storing import prepare, settings_for

EQUAL = {"colourfulness": 0.5, "compressibility": 0.5}
METHODS = ("mpa", "ls", "cached", "staged", "soup")
ORACLES: dict[str, dict[str, Any]] = {
    "as the basis": {},
    "of another seed": {"seed": 1},
    "of a third seed": {"seed": 2},
    "held to 131 nats": {"kl_target": 131.0},
}
SEEDS = tuple(ORACLES)[:3]


def at_equal(config: EvaluateConfig, **changes: Any) -> EvaluateConfig:
    """One oracle, at equal weights of two rewards in conflict, and no rivals, but for these changes."""
    return config.model_copy(update={"oracle_weights": (EQUAL,), "oracle_lambdas": {}, "rivals": (), **changes})


def families(config: EvaluateConfig) -> dict[str, EvaluateConfig]:
    """An evaluation of each oracle at equal weights of two rewards in conflict."""
    return {name: at_equal(config, methods=METHODS, oracle_settings=settings) for name, settings in ORACLES.items()}


def measure_retraining(config: EvaluateConfig) -> dict[str, Any]:
    """Gain and path KL of each oracle, each method's share of it, and of the mean of the seeds."""
    found = {name: _measured(one) for name, one in families(config).items()}
    first, *_ = seeds = [found[name] for name in SEEDS]
    gain = sum(one["gain"]["mean"] for one in seeds) / len(seeds)
    share = {method: first["gain"]["mean"] * of_first["mean"] / gain for method, of_first in first["share"].items()}
    return {"retraining": {**found, "mean of the seeds": {"gain": gain, "share": share}}}


def _measured(config: EvaluateConfig) -> dict[str, Any]:
    [training] = prepare(config).oracle_runs.values()
    summary = json.loads((run(config) / "summary.json").read_text())
    oracle = next(row for row in summary["cells"] if row["method"] == "oracle")
    shares = {row["method"]: row for row in summary["rivals"]}
    _, record = find_record(f"{training.name}@1", settings_for(None), "adapter")
    return {
        "gain": span(oracle, "weighted_gain"),
        "path_kl": record.metrics["path_kl"].value,
        "binding_right": oracle["binding_right"],
        "share": {method: span(shares[method], "share_of_oracle") for method in METHODS},
        "difference_to_mpa": span(shares["oracle"], "difference"),
    }
