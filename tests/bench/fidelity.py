"""What each mode of the engine costs, and how near it comes to the exact blend: three adapters of the sprites bundle.

Fills `modes` (at 20 steps), `modes_by_steps` and `ls_variance` of results/engine.json and draws results/fidelity.png.
--quick is for trying the script out: its figures mean little and are not written; --redraw only draws again.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from fidelity_parts.figure import draw
from fidelity_parts.measures import ls_variance, measure
from fidelity_parts.runs import MODES, ModeRun, engine, run_mode
from figures import RESULTS, write_figures
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

STEPS = (10, 20, 50)
MAIN_STEPS = 20
PROMPTS, SEEDS = 16, 2


def run_all(steps: tuple[int, ...], prompts: int, seeds: int, jobs: int) -> dict[int, dict[str, ModeRun]]:
    """Run every mode at every number of steps, the longest first."""
    context = multiprocessing.get_context("spawn")
    found: dict[int, dict[str, ModeRun]] = {count: {} for count in steps}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {
            pool.submit(run_mode, mode, count, prompts, seeds): (count, mode.name)
            for count in sorted(steps, reverse=True)
            for mode in MODES
        }
        for done in tqdm(as_completed(waiting), total=len(waiting), unit="run"):
            count, name = waiting[done]
            found[count][name] = done.result()
    return {count: {mode.name: runs[mode.name] for mode in MODES} for count, runs in found.items()}


def show(steps: int, figures: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "mode", "rows, K = 3", "rows, pairs", "hypervolume", "latent RMSE", "to iid LS", title=f"{steps} steps"
    )
    for name, found in figures.items():
        low, high = found["hypervolume_share_interval"]
        near, closest, farthest = found["latent_rmse_to_independent_ls"]
        table.add_row(
            name,
            f"{found['rows_ratio']:.2f}",
            f"{found['rows_ratio_pairs']:.2f}",
            f"{100 * found['hypervolume_share']:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            f"{found['latent_rmse']:.3f}",
            f"{near:.2f} ({closest:.2f} to {farthest:.2f})",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.redraw:
        known = json.loads((RESULTS / "engine.json").read_text())["figures"]["modes_by_steps"]
        (RESULTS / "fidelity.png").write_bytes(draw({int(count): figures for count, figures in known.items()}))
        return
    steps, prompts, seeds = ((10,), 3, 1) if options.quick else (STEPS, PROMPTS, SEEDS)
    runs = run_all(steps, prompts, seeds, options.jobs)
    modes = {count: measure(found, count, engine().bank.names) for count, found in runs.items()}
    for count, figures in modes.items():
        show(count, figures)
    if options.quick:
        return
    (RESULTS / "fidelity.png").write_bytes(draw(modes))
    write_figures(
        "engine",
        {
            "modes": modes[MAIN_STEPS],
            "modes_by_steps": modes,
            "ls_variance": {count: ls_variance(found, count) for count, found in runs.items()},
            "fidelity_images_per_mix": PROMPTS * SEEDS,
        },
        update=True,
    )


if __name__ == "__main__":
    main()
