"""How many rewards can be blended? Two, three, four and six of them at equal weights, and what an image then costs.

infra/runs/growth.toml says which mixes: every reward is in as many of a size as every other, so that the sizes differ
in how many rewards there are and not in which. Twenty minutes on two cores; what is stopped goes on where it was.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from evaluations import run, span
from figures import RESULTS, write_figures
from growth_parts.design import company, fairest
from growth_parts.figure import draw
from growth_parts.tables import Growth
from growth_parts.timing import seconds_table

from workers.evaluation import EvaluateConfig, load_evaluation
from workers.evaluation.files import COMMIT
from workers.evaluation.gaps import Bootstrap
from workers.evaluation.storing import prepare

RUN = Path(__file__).parents[2] / "infra" / "runs" / "growth.toml"
SPANS = ("gain", "kept", "difference", "rows", "rows_ratio", "seconds_ratio", "binding_right", "diversity")


def read_growth(directory: Path) -> Growth:
    """What a finished evaluation says of more rewards."""
    samples = load_evaluation(directory, table="samples")
    summary = json.loads((directory / COMMIT).read_text())
    sds = {name: scale["sd"] for name, scale in summary["scales"].items()}
    config = summary["config"]
    bootstrap = Bootstrap(config["resamples"], config["bootstrap_seed"], config["confidence"])
    return Growth(samples, summary["facts"]["adapters"], sds, bootstrap)


def figures(growth: Growth, table: pd.DataFrame) -> dict[str, Any]:
    """Every method's figures by number of rewards, each reward's share, and whether the sizes are in like company."""
    effects = growth.effects()
    return {
        "mixes": {
            str(count): [" + ".join(growth.basis[one] for one in mix) for mix in mixes]
            for count, mixes in growth.mixes().items()
        },
        "base": growth.base(),
        "by_method": _nested(table, ("method", "rewards")),
        "by_reward": _nested(growth.by_reward(), ("method", "rewards", "adapter")),
        "company": {str(count): company(effects, mixes) for count, mixes in growth.mixes().items() if count > 1},
        "adapters_alone": {
            name: dict(zip(growth.basis, gains, strict=True))
            for name, gains in zip(growth.basis, effects.tolist(), strict=True)
        },
    }


def _nested(table: pd.DataFrame, keys: tuple[str, ...]) -> dict[str, Any]:
    """Rows as dictionaries in each other, the intervals of each in the innermost; what is undefined is left out."""
    found: dict[str, Any] = {}
    for row in table.to_dict("records"):
        place = found
        for key in keys:
            place = place.setdefault(str(row[key]), {})
        place |= {name: span(row, name) for name in SPANS if name in row and row[name] == row[name]}
    return found


def print_design(config: EvaluateConfig) -> None:
    """The fairest mixes by what the adapters do alone, and the company of each size; no blend is looked at."""
    growth = read_growth(run(config.model_copy(update={"methods": (), "weights": ()})))
    for count, mixes in fairest(growth.effects()).items():
        names = ", ".join(" + ".join(growth.basis[one] for one in mix) for mix in mixes)
        print(f"{count}: company {company(growth.effects(), mixes):.3f}: {names}")


def measure(config: EvaluateConfig) -> None:
    """Evaluate, then time each size, and write all figures, the table and the picture."""
    growth = read_growth(run(config))
    table = growth.table().merge(seconds_table(prepare(config).job), how="left", on=["method", "rewards"])
    facts = {"prompts": config.num_prompts, "seeds": len(config.seeds)}
    write_figures("growth", {**facts, **figures(growth, table)})
    table.to_csv(RESULTS / "growth.csv", index=False, float_format="%.6g")
    (RESULTS / "growth.png").write_bytes(draw(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, help="processes that make images; the run file's unless given")
    parser.add_argument("--design", action="store_true", help="only print the mixes that the run file should hold")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = EvaluateConfig.from_toml(RUN)
    if asked.workers is not None:
        config = config.model_copy(update={"num_workers": asked.workers})
    (print_design if asked.design else measure)(config)


if __name__ == "__main__":
    main()
