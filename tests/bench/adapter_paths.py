"""Low-rank rows beside merged weights and PEFT's mixed batch.

The paths themselves are measured by tests/gpu/adapter_paths.py, on the GPU where there is one (ten minutes on a CPU).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from figures import write_figures
from rich.console import Console
from rich.table import Table

SCRIPT = Path(__file__).parents[1] / "gpu" / "adapter_paths.py"
REPEATS = {"sprites": "9", "sd15-block": "3"}


def measure(net: str) -> list[dict[str, Any]]:
    """One line per (K, rows, kind): times over the plain base's."""
    command = [sys.executable, str(SCRIPT), "--nets", net, "--repeats", REPEATS[net]]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return read(done.stdout)


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Median ratio over all K and rows for each path, and every case beneath."""
    figures: dict[str, Any] = {}
    for kind in ("one-hot", "soup"):
        cases = [line for line in lines if line["kind"] == kind]
        paths = [name for name in cases[0] if name not in ("net", "adapters", "rows", "kind", "base_ms")]
        figures[kind] = {path: round(statistics.median(case[path] for case in cases), 3) for path in paths}
        for case in cases:
            figures[kind][f"k{case['adapters']}_rows{case['rows']}"] = {path: case[path] for path in paths}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from-lines", nargs="*", type=Path, help="files of lines printed by the script, to sum up")
    given = parser.parse_args().from_lines
    lines = [line for path in given for line in read(path.read_text())] if given else []
    lines = lines or [line for net in REPEATS for line in measure(net)]
    figures = {net: summarise([line for line in lines if line["net"] == net]) for net in REPEATS}
    table = Table("net", "rows", "path", "time over plain base (median over K and rows)")
    for net, kinds in figures.items():
        for kind, found in kinds.items():
            for path, ratio in found.items():
                if isinstance(ratio, float):
                    table.add_row(net, kind, path, f"{ratio:.3f}")
    Console().print(table)
    write_figures("adapter_paths", {"time_over_base": figures})


if __name__ == "__main__":
    main()
