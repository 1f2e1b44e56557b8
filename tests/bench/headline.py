"""The headline: does the blend beat its rivals and match models retrained for each preference?

infra/runs/headline.toml is the whole protocol, two days on two cores (--whole). What runs otherwise is its core. On all
its prompts and seeds: every method and rival beside the models retrained for three mixes of two rewards in conflict and
for half the strength, and beside models retrained by other seeds and nearer the base. On fewer: every mix that has an
oracle, among them one whose rewards have gradients to be guided by. On fewer still: stronger blends with their path KL,
other guidance and more steps, the grids of weights and strengths, the rivals of twenty candidates, and the Jensen gap.
What is stopped goes on where it was: nothing is made twice. results/headline.json says on how many prompts each part
rests.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evaluations import run, sized
from figures import RESULTS, write_figures
from headline_parts.gains import difference, gains_by_image, read_images, share_over_seeds
from headline_parts.jensen import measure_jensen
from headline_parts.retraining import EQUAL, FEW, at_equal, measure_retraining
from headline_parts.tables import mix, read_evaluation, read_grid, read_strength

from workers.evaluation import EvaluateConfig
from workers.evaluation.rivals import parse_rival

RUN = Path(__file__).parents[2] / "infra" / "runs" / "headline.toml"
SEARCHING = ("best_of_20", "code_20_5")
PICTURES = {"retraining.png": "headline.png", "cost.png": "headline_cost.png"}
# The adapters were tuned at guidance 1, in 20 steps, and are evaluated at 3.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 3": {},
    "guidance 5": {"guidance_scale": 5.0},
    "guidance 3, 40 steps": {"num_inference_steps": 40},
}
# Prompts and seeds of each part.
SIZES = {
    "main": (200, 8),
    "mixes": (32, 4),
    "strength": (24, 2),
    "sampling": (16, 4),
    "retraining": (200, 8),
    "grid": (16, 4),
    "search": (8, 4),
    "gap": (8, 4),
}


def narrowed(config: EvaluateConfig) -> EvaluateConfig:
    """Only the preferences and strengths that have an oracle."""
    rivals = tuple(name for name in config.rivals if name not in SEARCHING)
    grids = {"pair_weights": (), "simplex_steps": 0, "equal_weights": False, "kl_lambdas": (1.0,)}
    return config.model_copy(update={**grids, "rivals": rivals})


def in_conflict(config: EvaluateConfig) -> tuple[dict[str, float], ...]:
    """The oracles' weights of two rewards in conflict."""
    return tuple(one for one in config.oracle_weights if set(one) == set(EQUAL))


def contested(config: EvaluateConfig) -> EvaluateConfig:
    """Only two rewards in conflict, whose rivals are those without gradients: compressibility has none."""
    narrow = narrowed(config)
    rivals = tuple(name for name in narrow.rivals if not parse_rival(name).needs_gradients)
    return narrow.model_copy(update={"oracle_weights": in_conflict(config), "rivals": rivals})


def searching(config: EvaluateConfig) -> EvaluateConfig:
    """The rivals of twenty candidates beside the blend, at equal weights of two rewards in conflict."""
    return at_equal(narrowed(config), rivals=SEARCHING, methods=("mpa",))


def dialled(config: EvaluateConfig) -> EvaluateConfig:
    """The blend at more than its usual strength, with the path KL: an oracle may have gone further than it goes."""
    strengths = {"kl_methods": ("mpa",), "kl_lambdas": (1.0, 1.25, 1.5), "kl_everywhere": True, "path_kl": True}
    return at_equal(narrowed(config), methods=FEW, oracle_weights=in_conflict(config), **strengths)


def gridded(config: EvaluateConfig) -> EvaluateConfig:
    """The whole grids of weights and strengths, of the blend and what costs one model."""
    return at_equal(config, methods=FEW, oracle_weights=())


def measure_main(config: EvaluateConfig) -> dict[str, Any]:
    """The evaluation itself, and more about each mix; its pictures and its table are kept for the README."""
    directory = run(config)
    for name, kept in PICTURES.items():
        shutil.copyfile(directory / name, RESULTS / kept)
    shutil.copyfile(directory / "summary.csv", RESULTS / "headline.csv")
    return {**read_evaluation(directory), **compare_by_mix(config, directory)}


def compare_by_mix(config: EvaluateConfig, directory: Path) -> dict[str, Any]:
    """method -> mix -> share of the oracle's gain with prompts and seeds drawn anew, and difference to the blend."""
    images = read_images(directory)
    shares: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for weights in config.oracle_weights:
        gains = gains_by_image(images, weights)
        for name, mine in gains.items():
            shares.setdefault(name, {})[mix(weights)] = asdict(share_over_seeds(mine, gains["oracle"], config))
            differences.setdefault(name, {})[mix(weights)] = asdict(difference(mine, gains["mpa"], config))
    return {"share_over_seeds": shares, "difference_to_mpa_by_mix": differences}


def measure_grid(config: EvaluateConfig) -> dict[str, Any]:
    """Reach over the whole grids; the picture of the fronts is kept."""
    directory = run(config)
    shutil.copyfile(directory / "pareto.png", RESULTS / "headline_pareto.png")
    return {"grid": read_grid(directory)}


def measure_sampling(config: EvaluateConfig) -> dict[str, Any]:
    """Shares of the oracle's gain at equal weights when the images are made by other guidance, or in more steps."""
    kept = ("prompts", "seeds", "share_of_oracle", "weighted_gain", "binding_right")
    found = {name: read_evaluation(run(config.model_copy(update=changes))) for name, changes in SAMPLINGS.items()}
    return {"sampling": {name: {key: one[key] for key in kept} for name, one in found.items()}}


def parts(whole: bool) -> dict[str, Callable[[EvaluateConfig], dict[str, Any]]]:
    """What each part does with the run file's settings."""

    def core(name: str, config: EvaluateConfig) -> EvaluateConfig:
        return sized(config, *SIZES[name])

    return {
        "main": lambda config: measure_main(config if whole else contested(core("main", config))),
        "mixes": lambda config: {"mixes": read_evaluation(run(narrowed(core("mixes", config))))},
        "strength": lambda config: {"strength": read_strength(run(dialled(core("strength", config))))},
        "sampling": lambda config: measure_sampling(at_equal(narrowed(core("sampling", config)), methods=FEW)),
        "retraining": lambda config: measure_retraining(narrowed(core("retraining", config))),
        "grid": lambda config: measure_grid(gridded(core("grid", config))),
        "search": lambda config: {"search": read_evaluation(run(searching(core("search", config))))},
        "gap": lambda config: measure_jensen(config, *SIZES["gap"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=SIZES, action="append", help="only this one; may be repeated")
    parser.add_argument("--whole", action="store_true", help="the whole run file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = EvaluateConfig.from_toml(RUN)
    for name, measure in parts(asked.whole).items():
        if name in (asked.part or SIZES):
            write_figures("headline", measure(config), update=True, section="" if name == "main" else name)


if __name__ == "__main__":
    main()
