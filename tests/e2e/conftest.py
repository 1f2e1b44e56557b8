"""Programs run as a user would run them: the installed console script, in a directory of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).parent / "diffusion-blend"


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, str]:
    """Environment of a user with a registry and a cache of the test's own, and no Ray cluster."""
    environment = {
        **os.environ,
        "DIFFUSION_BLEND_STORE_URL": f"file://{tmp_path / 'store'}",
        "DIFFUSION_BLEND_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    return environment


@pytest.fixture
def cli(tmp_path: Path, surroundings: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `diffusion-blend ...` to its end in tmp_path; returns the ended process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments],
            cwd=tmp_path,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=560,
        )

    return run


@pytest.fixture
def started_cli(tmp_path: Path, surroundings: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `diffusion-blend ...` in tmp_path; what is still alive at the end of the test is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(SCRIPT), *arguments],
            cwd=tmp_path,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
