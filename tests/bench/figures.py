"""Where a benchmark leaves its figures: tests/bench/results/NAME.json, quoted by the README."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """Processor model, the cores this process may use, Python's and torch's versions."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {cores} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def write_figures(name: str, figures: dict[str, Any], *, update: bool = False, section: str = "") -> Path:
    """Write one benchmark's result file with the command, the date and the hardware; print it as a table.

    update=True is for a file that several benchmarks fill: it replaces the figures that this script wrote the last
    time and keeps the others'. Each script's command, date, hardware and keys stand under `parts`; a script with
    sections that run one by one has a part for each.
    """
    path = RESULTS / f"{name}.json"
    script = Path(sys.argv[0]).stem if update else name
    origin = {
        "command": " ".join(["python", f"tests/bench/{script}.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
    }
    if update:
        earlier = json.loads(path.read_text()) if path.exists() else {}
        facts = merge_part(earlier, f"{script} --{section}" if section else script, origin, figures)
    else:
        facts = {**origin, "figures": figures}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    table = Table("figure", "value", title=f"{name}: {origin['hardware']}")
    for key, value in flatten(figures):
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(f"written to {path}")
    return path


def merge_part(facts: dict[str, Any], script: str, origin: dict[str, str], figures: dict[str, Any]) -> dict[str, Any]:
    """Return `facts` with one script's figures exchanged: those it no longer writes go, those of other scripts stay.

    Raises ValueError where a figure belongs to another script.
    """
    parts = {other: part for other, part in facts.get("parts", {}).items() if other != script}
    for other, part in parts.items():
        taken = sorted(set(part["keys"]) & set(figures))
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: written by {_file(other)} already; name the figures of {_file(script)} anew"
            )
    own = facts.get("parts", {}).get(script, {}).get("keys", [])
    kept = {key: value for key, value in facts.get("figures", {}).items() if key not in own}
    return {
        **origin,
        "parts": {**parts, script: {**origin, "keys": sorted(figures)}},
        "figures": {**kept, **figures},
    }


def _file(part: str) -> str:
    script, *section = part.split(" ", 1)
    return " ".join([f"{script}.py", *section])


def flatten(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in figures.items():
        name = f"{prefix}{key}"
        rows += flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return rows
