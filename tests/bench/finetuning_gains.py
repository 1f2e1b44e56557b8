"""What fine-tuning gains on sprites: every adapter's run file with several training seeds, on the held-out images.

Each run keeps its checkpoints in the cache under the digest of its settings: interrupted, the script goes on where it
was, and finished runs are only read. An hour on two free cores with --jobs 2.
"""

import argparse
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import write_figures
from scipy.stats import t as student

RUNS = Path(__file__).parents[2] / "infra" / "runs"
BASES = ("colourfulness", "compressibility", "alignment", "brightness")


def run(basis: str, seed: int, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of one training run, from its directory if it is finished; in this process, on one core."""
    import torch

    from blend.finetune.config import TrainConfig
    from workers.publishing import run_directory
    from workers.training import fit_basis

    torch.set_num_threads(1)
    settings = TrainConfig.from_toml(RUNS / f"train_{basis}.toml").model_dump()
    config = TrainConfig.parse({**settings, "seed": seed, "num_workers": 0, **changes})
    return fit_basis(
        config, output_dir=run_directory(config), show_bar=False, on_progress=announce(basis, seed)
    ).metrics


def announce(basis: str, seed: int) -> Any:
    def show(line: dict[str, Any]) -> None:
        if "held_out_mean" in line:
            print(
                f"{basis} seed {seed} iteration {line['iteration']}: held out {line['held_out_mean']:.3f} "
                f"at {line['held_out_path_kl']:.0f} nats",
                file=sys.stderr,
                flush=True,
            )

    return show


def outcome(history: list[dict[str, Any]]) -> dict[str, Any]:
    """One run: gain in standard deviations of the base's held-out reward, its own 95 % interval, and what it cost."""
    from blend.finetune.held_out import published

    base, tuned = history[0], published(history)
    std = base["held_out_std"]
    facts = {
        "gain": (tuned["held_out_mean"] - base["held_out_mean"]) / std,
        "gain_ci": math.hypot(tuned["held_out_ci"], base["held_out_ci"]) / std,
        "base_std": std,
        "path_kl": tuned["held_out_path_kl"],
        "alpha": tuned["kl_weight"],
        "diversity": tuned["held_out_diversity"] / base["held_out_diversity"],
        "iterations": tuned["iteration"],
    }
    for name, figures in tuned.get("watched", {}).items():
        before = base["watched"][name]
        facts[f"{name}_change"] = (figures["mean"] - before["mean"]) / before["std"]
    return facts


def summarise(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean gain over training seeds with Student's 95 % interval of that mean, and the means of the rest.

    The interval is over seeds: a run's own interval, over images, stands in `per_seed`.
    """
    gains = [one["gain"] for one in outcomes]
    mean = statistics.fmean(gains)
    margin = math.inf
    if len(gains) > 1:
        margin = float(student.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))
    rest = {
        key: statistics.fmean(one[key] for one in outcomes) for key in outcomes[0] if key not in ("gain", "gain_ci")
    }
    facts: dict[str, Any] = {"mean": mean, **rest, "seeds": len(gains)}
    if math.isfinite(margin):
        facts |= {"low": mean - margin, "high": mean + margin}
    return {**facts, "per_seed": outcomes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--train-only", action="store_true", help="train what is missing and write no figures")
    options = parser.parse_args()
    wanted = [(basis, seed) for seed in options.seeds for basis in options.bases]
    if options.train_only and len(wanted) == 1:
        run(*wanted[0])
        return

    def train(one: tuple[str, int]) -> None:
        command = [sys.executable, __file__, "--train-only", "--bases", one[0], "--seeds", str(one[1])]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(train, wanted))
    if not options.train_only:
        gains = {basis: summarise([outcome(run(basis, seed)) for seed in options.seeds]) for basis in options.bases}
        write_figures("finetuning", {"gains": gains}, update=True)


if __name__ == "__main__":
    main()
