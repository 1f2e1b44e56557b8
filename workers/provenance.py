"""Where a trained adapter comes from: the code that made it, and the terms of the base model it belongs to."""

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from workers.bundles import resolve_base

CHECKOUT = Path(__file__).resolve().parents[1]
SPRITES_LICENCE = "Apache-2.0"


def package_version() -> str:
    """The version of this package."""
    return version("diffusion-blend")


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, "-dirty" behind it where files differ; None outside one."""
    if not (CHECKOUT / ".git").exists():
        return None
    describe = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def base_licence(base_model: str) -> str | None:
    """The base model's licence as its model card declares it; None where it has no card or the card does not say."""
    if base_model == "sprites":
        return SPRITES_LICENCE
    card = Path(resolve_base(base_model)) / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'") if found else None
