"""Packages with reward plugins as an installer leaves them: a module, and a dist-info with real entry points."""

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blend import rewards
from blend.rewards.plugins import GROUP

README = Path(rewards.__file__).with_name("README.md").read_text()
# the example's module and the test of its contract, as the README has them
MODULE, CONTRACT = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
[PROJECT] = [tomllib.loads(block) for block in re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]
MODULE_FILE = re.search(r"`(\w+\.py)`:", README)[1]


def put_package(site: Path, package: str, points: dict[str, str], module: str, *, file: str | None = None) -> None:
    """Write version 1.2 of a package into a directory that is, or will be, on the path."""
    info = site / f"{package.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    (site / (file or f"{package.replace('-', '_')}.py")).write_text(module)


def put_example(site: Path) -> None:
    """The README's example, installed as its pyproject.toml says."""
    project = PROJECT["project"]
    put_package(site, project["name"], project["entry-points"][GROUP], MODULE, file=MODULE_FILE)


@contextmanager
def on_path(site: Path) -> Iterator[Path]:
    """The packages in a directory are installed for this process; afterwards their modules are forgotten."""
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield site
    finally:
        sys.path.remove(str(site))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(f"{site}/"):
                del sys.modules[name]
