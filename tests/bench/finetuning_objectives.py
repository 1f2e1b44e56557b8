"""DPOK, DDPO and GRPO on one reward with the same budget: held-out reward against path KL, on one plot.

Runs are kept and resumed as by finetuning_gains.py, whose runs of the run file's own objective are used again.
"""

import argparse
from typing import Any

from figures import RESULTS, write_figures
from finetuning_gains import outcome, run, summarise
from matplotlib.figure import Figure

BASIS = "colourfulness"
OBJECTIVES = ("grpo", "ddpo", "dpok")


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    keys = ("iteration", "held_out_mean", "held_out_ci", "held_out_path_kl")
    return [{key: line[key] for key in keys} for line in history if "held_out_mean" in line]


def draw(curves: dict[str, list[list[dict[str, float]]]], basis: str) -> None:
    """One line per objective and seed, 95 % intervals over the held-out images."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (objective, runs) in enumerate(curves.items()):
        for place, lines in enumerate(runs):
            axes.errorbar(
                [line["held_out_path_kl"] for line in lines],
                [line["held_out_mean"] for line in lines],
                yerr=[line["held_out_ci"] for line in lines],
                color=f"C{number}",
                marker="osd"[number],
                capsize=3,
                label=objective if place == 0 else None,
            )
    axes.set_xlabel("path KL to the base on held-out prompts (nats)")
    axes.set_ylabel(f"held-out {basis}")
    axes.set_title(f"{basis} by objective, same budget; marks are evaluations")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "objectives.png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--basis", default=BASIS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    options = parser.parse_args()
    histories = {
        objective: [run(options.basis, seed, objective=objective) for seed in options.seeds]
        for objective in options.objectives
    }
    curves = {objective: [evaluations(history) for history in runs] for objective, runs in histories.items()}
    draw(curves, options.basis)
    figures = {
        objective: {**summarise([outcome(history) for history in runs]), "curves": curves[objective]}
        for objective, runs in histories.items()
    }
    write_figures("finetuning", {"objectives": {"basis": options.basis, **figures}}, update=True)


if __name__ == "__main__":
    main()
