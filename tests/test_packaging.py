"""The lock and the package's own statements agree."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
]


def locked() -> dict[str, Version]:
    pairs = (line.split("==") for line in LOCK_LINES)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_the_lock_pins_every_requirement_within_its_range(line):
    requirement = Requirement(line)
    assert locked()[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lock_is_portable():
    """No local builds, editable lines or hardware libraries: those depend on the machine."""
    assert not [line for line in LOCK_LINES if "+" in line or "@" in line or line.startswith(("-", "nvidia", "triton"))]
    assert canonicalize_name(PROJECT["name"]) not in locked()


def test_the_deployments_are_written_for_the_locked_prefect():
    deployments = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())
    assert Version(str(deployments["prefect-version"])) == locked()["prefect"]


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
