"""Runs one benchmark by name, or all: `make bench`, `make bench BENCH=main_job`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = ("run", "figures", "evaluations")
BENCHMARKS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SHARED)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"Error: no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    # threads that spin while they wait for each other lose most of their time on a machine that others use
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    codes = [
        subprocess.call([sys.executable, str(HERE / f"{name}.py")], env=environment) for name in names or BENCHMARKS
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
