"""How far models retrained for one preference differ, and what the blend is worth beside each of them.

A training that ends before alpha decides how far it goes is one of several answers to the same preference. Beside the
oracle of the headline there are its twins of other seeds, which say how far retraining itself varies, and one held to
half its path KL, which says what can be had nearer the base.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from evaluations import run, span
from headline_parts.gains import Array, gains_by_image, read_images, share_over_seeds

from blend.metrics import interval, resample_weights
from workers.bundles import find_record
from workers.evaluation import EvaluateConfig
from workers.evaluation.shares import ratio
from workers.evaluation.storing import prepare, settings_for

EQUAL = {"colourfulness": 0.5, "compressibility": 0.5}
FEW = ("mpa", "ls", "soup")  # the blend, and what costs one model
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
    return {name: at_equal(config, methods=FEW, oracle_settings=settings) for name, settings in ORACLES.items()}


def measure_retraining(config: EvaluateConfig) -> dict[str, Any]:
    """Gain and path KL of each oracle, each method's share of it, and of the mean of the seeds."""
    evaluations = families(config)
    made = {name: run(one) for name, one in evaluations.items()}
    found = {name: _measured(one, made[name]) for name, one in evaluations.items()}
    return {"retraining": {**found, "mean of the seeds": _of_the_mean(config, [made[name] for name in SEEDS])}}


def _of_the_mean(config: EvaluateConfig, directories: Sequence[Path]) -> dict[str, Any]:
    """Shares of the gain that these oracles have on average, resampled together with it."""
    gains = [gains_by_image(read_images(directory), EQUAL) for directory in directories]
    oracle = np.mean([one["oracle"] for one in gains], axis=0)
    draws = resample_weights(len(oracle), config.resamples, np.random.default_rng(config.bootstrap_seed))

    def over_prompts(table: Array) -> tuple[float, Array]:
        return table.mean(), draws @ table.mean(axis=1)

    whole, level = over_prompts(oracle), config.confidence
    return {
        "gain": asdict(interval(*whole, level)),
        "share": {name: asdict(ratio(*over_prompts(gains[0][name]), *whole, level)) for name in FEW},
        "share_over_seeds": {name: asdict(share_over_seeds(gains[0][name], oracle, config)) for name in FEW},
    }


def _measured(config: EvaluateConfig, directory: Path) -> dict[str, Any]:
    [training] = prepare(config).oracle_runs.values()
    summary = json.loads((directory / "summary.json").read_text())
    oracle = next(row for row in summary["cells"] if row["method"] == "oracle")
    shares = {row["method"]: row for row in summary["rivals"]}
    _, record = find_record(f"{training.name}@1", settings_for(None), "adapter")
    return {
        "gain": span(oracle, "weighted_gain"),
        "path_kl": record.metrics["path_kl"].value,
        "binding_right": oracle["binding_right"],
        "share": {method: span(shares[method], "share_of_oracle") for method in FEW},
        "difference_to_mpa": span(shares["oracle"], "difference"),
    }
