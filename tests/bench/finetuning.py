"""Fine-tuning on the sprites: its speed beside a plain DDPO loop, what it gains, the objectives compared, and kills.

--speed (what runs without a flag) takes about ten minutes; --gains and --objectives train for an hour or two on one
core, --resume kills for minutes. Training runs lie below --work, go on where they were and are only read once finished:
take another --work after a change of the code. Each section replaces its own figures in results/finetuning.json.
--quick and --iterations are for trying the script out: figures are shown and not written.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import RESULTS, flatten, write_figures
from finetuning_parts.drawings import score_drawings
from finetuning_parts.gains import compare_objectives, gains_of
from finetuning_parts.plot import draw_objectives
from finetuning_parts.runs import Run, run_config, train_all

from blend.finetune.objectives import OBJECTIVES
from infra.settings import read_settings

BASES = ("colourfulness", "compressibility", "alignment", "brightness")
# as far as two base deviations; the run file stops where every picture still shows its object
LONGER = {"compressibility": {"iterations": 40}}
SECTIONS = ("speed", "gains", "objectives", "resume")
ROUNDS, SEEDS = 5, (0, 1, 2)
KILLS, KILL_ROUNDS = 5, 2
QUICK = {"rounds": 1, "batches": (), "prompts_per_iteration": 2}
QUICK_ITERATIONS = 2


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    from finetuning_parts.speed import race

    return race(**QUICK) if options.quick else race(options.rounds)


def measure_gains(options: argparse.Namespace) -> dict[str, Any]:
    """Train what was asked for; the other bases' earlier figures stay."""
    runs = {
        basis: {
            seed: Run.of(run_config(basis, seed, **{**LONGER.get(basis, {}), **options.changes}), options.work)
            for seed in options.seeds
        }
        for basis in options.basis
    }
    found = train_all([run for by_seed in runs.values() for run in by_seed.values()], options.jobs)
    gains = {}
    for basis, by_seed in runs.items():
        drawings = score_drawings(next(iter(by_seed.values())).config)
        gains[basis] = gains_of({seed: found[run.directory] for seed, run in by_seed.items()}, drawings.mean().item())
    for by_seed in runs.values():
        print(*(f"look at {run.directory}/adapter/samples.png" for run in by_seed.values()), sep="\n")
    return {"gains": {**({} if options.changes else earlier("gains")), **gains}}


def measure_objectives(options: argparse.Namespace) -> dict[str, Any]:
    """Every objective on the first basis that was asked for, with the same budget; draws results/objectives.png."""
    basis = options.basis[0]
    runs = {
        (objective, seed): Run.of(run_config(basis, seed, objective=objective, **options.changes), options.work)
        for seed in options.seeds
        for objective in OBJECTIVES
    }
    found = train_all(runs.values(), options.jobs)
    compared = compare_objectives(
        {name: {seed: found[runs[name, seed].directory] for seed in options.seeds} for name in OBJECTIVES}
    )
    place = options.work if options.changes else RESULTS
    (place / "objectives.png").write_bytes(draw_objectives(basis, {name: compared[name] for name in OBJECTIVES}))
    return {"objectives": {"basis": basis, "seeds": list(options.seeds), **compared}}


def measure_resume(options: argparse.Namespace) -> dict[str, Any]:
    """Whole and killed runs compared bit for bit; `runs` killed ones, of which `equal` came out the same."""
    from finetuning_parts.kills import kill_rounds

    outcomes = []
    for seed in range(1 if options.quick else KILL_ROUNDS):
        directory = options.work / f"kills-{seed}"
        shutil.rmtree(directory, ignore_errors=True)
        outcomes.append(kill_rounds(1 if options.quick else options.kills, directory, seed=seed))
        print(f"killed run {seed}: {outcomes[-1]}", flush=True)
    return {
        "resume_bit_exact": {
            "runs": len(outcomes),
            "equal": sum(bool(outcome["equal"]) for outcome in outcomes),
            "kills": sum(outcome["kills"] for outcome in outcomes),
        }
    }


MEASURES = {
    "speed": measure_speed,
    "gains": measure_gains,
    "objectives": measure_objectives,
    "resume": measure_resume,
}


def earlier(key: str) -> dict[str, Any]:
    """A figure as it stands in the result file; empty where there is none."""
    path = RESULTS / "finetuning.json"
    return json.loads(path.read_text())["figures"].get(key, {}) if path.exists() else {}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for section in SECTIONS:
        parser.add_argument(f"--{section}", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the race")
    parser.add_argument("--basis", nargs="+", choices=BASES, default=list(BASES), help="objectives take the first")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--iterations", type=int, help="instead of the run files' own")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time, one core each")
    parser.add_argument("--kills", type=int, default=KILLS, help=f"in each of {KILL_ROUNDS} runs")
    parser.add_argument("--work", type=Path, default=read_settings().cache_dir / "bench" / "finetuning")
    options = parser.parse_args(arguments)
    iterations = options.iterations or (QUICK_ITERATIONS if options.quick else None)
    options.changes = {} if iterations is None else {"iterations": iterations}
    options.work = options.work.expanduser().resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.sections = [section for section in SECTIONS if getattr(options, section)] or ["speed"]
    return options


def main() -> None:
    options = parse()
    for section in options.sections:
        figures = MEASURES[section](options)
        if options.quick or options.changes:
            print(*(f"{key}: {value}" for key, value in flatten(figures)), sep="\n")
        else:
            write_figures("finetuning", figures, update=True, section=section)


if __name__ == "__main__":
    main()
