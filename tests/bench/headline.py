"""The headline: does the blend beat its rivals and match models retrained for each preference?

Runs infra/runs/headline.toml, or part of it: --prompts and --seeds take fewer, --narrow leaves out all mixes and
strengths but those that have an oracle, and rivals of twenty candidates; --search then measures these, on prompts of
their own number. results/headline.json says what was measured. What is stopped goes on where it was: nothing is made
twice.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, write_figures
from headline_parts.jensen import measure_jensen
from headline_parts.tables import read_evaluation, read_strength

from workers.evaluation import EvaluateConfig, evaluate
from workers.evaluation.files import files_in
from workers.evaluation.storing import is_complete, open_ledger, prepare, ready, run_directory

RUN = Path(__file__).parents[2] / "infra" / "runs" / "headline.toml"
SEARCHING = ("best_of_20", "code_20_5")
GAP_PROMPTS, GAP_SEEDS = 16, 2
PICTURES = {"retraining.png": "headline.png", "cost.png": "headline_cost.png", "pareto.png": "headline_pareto.png"}


def narrowed(config: EvaluateConfig) -> EvaluateConfig:
    """Only the preferences and strengths that have an oracle."""
    rivals = tuple(name for name in config.rivals if name not in SEARCHING)
    return config.model_copy(update={"pair_weights": (), "simplex_steps": 0, "kl_lambdas": (1.0,), "rivals": rivals})


def searching(config: EvaluateConfig) -> EvaluateConfig:
    """The rivals of twenty candidates beside the blend, where oracles were retrained for two rewards in conflict."""
    weights = tuple(one for one in config.oracle_weights if set(one) == {"colourfulness", "compressibility"})
    return narrowed(config).model_copy(
        update={"rivals": SEARCHING, "methods": ("mpa",), "oracle_weights": weights, "oracle_lambdas": {}}
    )


def dialled(config: EvaluateConfig) -> EvaluateConfig:
    """The blend at more than its usual strength, with the path KL: an oracle may have gone further than it goes."""
    return searching(config).model_copy(
        update={
            "rivals": (),
            "methods": ("mpa", "ls", "soup"),
            "kl_methods": ("mpa",),
            "kl_lambdas": (1.0, 1.25, 1.5),
            "kl_everywhere": True,
            "path_kl": True,
        }
    )


def run(config: EvaluateConfig) -> Path:
    """The directory of the finished evaluation."""
    planned = ready(prepare(config))
    directory = run_directory(planned)
    if not is_complete(planned, directory):
        evaluate(planned, directory, ledger=open_ledger(planned, None))
    print(f"{len(planned.job.cells)} settings in {directory}")
    return directory


def keep(directory: Path) -> None:
    """Copy the figures and the table, which the README shows."""
    for name, kept in PICTURES.items():
        if (directory / name).is_file():
            shutil.copyfile(directory / name, RESULTS / kept)
    shutil.copyfile(directory / "summary.csv", RESULTS / "headline.csv")
    assert files_in(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, help="prompts; default: the run file's")
    parser.add_argument("--seeds", type=int, help="seeds; default: the run file's")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--search", type=int, metavar="PROMPTS", help="measure the rivals of twenty candidates only")
    parser.add_argument("--strength", type=int, metavar="PROMPTS", help="measure stronger blends and path KL only")
    parser.add_argument("--gap", action="store_true", help="measure the Jensen gap only")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = EvaluateConfig.from_toml(RUN)
    seeds = tuple(range(asked.seeds)) if asked.seeds else config.seeds
    config = config.model_copy(update={"seeds": seeds, "num_prompts": asked.prompts or config.num_prompts})
    if asked.gap:
        write_figures("headline", measure_jensen(config, GAP_PROMPTS, GAP_SEEDS), update=True, section="gap")
        return
    if asked.search:
        config = searching(config.model_copy(update={"num_prompts": asked.search}))
        figures: dict[str, Any] = {"search": read_evaluation(run(config))}
        write_figures("headline", figures, update=True, section="search")
        return
    if asked.strength:
        directory = run(dialled(config.model_copy(update={"num_prompts": asked.strength})))
        write_figures("headline", {"strength": read_strength(directory)}, update=True, section="strength")
        return
    directory = run(narrowed(config) if asked.narrow else config)
    keep(directory)
    write_figures("headline", read_evaluation(directory), update=True)


if __name__ == "__main__":
    main()
