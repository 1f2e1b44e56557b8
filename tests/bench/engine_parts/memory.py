"""Memory of K adapters on the Stable Diffusion 1.5 architecture, by the engine's path and by merged weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "gpu" / "memory.py"


def memory_figures(adapters: int = 3, size: str = "sd15") -> dict[str, Any]:
    """Peak memory with K adapters over that of the pipeline alone, each in a process of its own (half a minute each).

    Peaks are what a process holds beyond its libraries: bfloat16 weights, a forward of 2 rows and a decoding, 256 px.
    """
    found = {path: _measure(path, adapters, size) for path in ("single", "low_rank", "merged")}
    single = found["single"]
    return {
        f"memory_ratio_k{adapters}": round(found["low_rank"]["peak_bytes"] / single["peak_bytes"], 4),
        f"memory_ratio_k{adapters}_merged": round(found["merged"]["peak_bytes"] / single["peak_bytes"], 4),
        "memory": {path: {name: line[name] for name in ("weight_bytes", "peak_bytes")} for path, line in found.items()},
    }


def _measure(path: str, adapters: int, size: str) -> dict[str, Any]:
    pixels = "256" if size == "sd15" else "64"
    command = [sys.executable, str(SCRIPT), "--path", path, "--adapters", str(adapters), "--size", size]
    command += ["--pixels", pixels, "--device", "cpu", "--dtype", "bfloat16"]
    # freed memory goes back at once, and one thread holds one arena: what is left is what is in use
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
