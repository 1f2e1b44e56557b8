"""Programs run as a user would run them: the installed console script, in a directory of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).parent / "diffusion-blend"


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `diffusion-blend ...` with a registry and a cache of the test's own; returns the ended process."""
    environment = {
        **os.environ,
        "DIFFUSION_BLEND_STORE_URL": f"file://{tmp_path / 'store'}",
        "DIFFUSION_BLEND_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=560,
        )

    return run
