"""Fine-tuning: images per second beside a plain DDPO loop, and a run whose workers are killed beside one left alone.

What adapters gain is measured by finetuning_gains.py, objectives are compared by finetuning_objectives.py; all three
fill results/finetuning.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import RESULTS, write_figures
from finetuning_parts.kills import kill_rounds
from finetuning_parts.speed import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each contestant, by turns")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs of random workers; 0 keeps the last figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = measure(options.rounds)
    if options.kills:
        with tempfile.TemporaryDirectory() as directory:
            found = kill_rounds(options.kills, Path(directory))
        figures["resume_bit_exact"] = {"runs": found["kills"], "equal": found["kills"] if found["equal"] else 0}
    else:
        kept = json.loads((RESULTS / "finetuning.json").read_text())["figures"]
        figures["resume_bit_exact"] = kept["resume_bit_exact"]
    write_figures("finetuning", figures, update=True)


if __name__ == "__main__":
    main()
