"""`pytest -n N --dist loadfile`: files that share a server stay together, and whatever takes long begins early."""

import re
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

# Fixtures that start something large, once for all tests of a process; a file that uses both counts to the first.
SERVERS = ("prefect", "cluster")
# Takes as long as the others of its server together: they would keep one worker busy after all else has ended.
ALONE = ("test_training_faults.py",)
USES = {name: re.compile(rf"def \w+\([^)]*\b{name}\b|usefixtures\(.*\"{name}\"") for name in SERVERS}


@cache
def server_of(path: Path) -> str | None:
    """The server that tests of a file share with those of other files."""
    text = "" if path.name in ALONE else path.read_text()
    return next((name for name, uses in USES.items() if uses.search(text)), None)


@cache
def turn_of(path: Path) -> tuple[int, str]:
    """What a file's tests are sorted by: servers, then files with slow tests, then the others."""
    server = server_of(path)
    if server or path.name in ALONE:
        return 0, server or ""
    return 1 if "mark.slow" in path.read_text() else 2, ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn_of(item.path))


class Shared(LoadFileScheduling):
    """Gives each worker whole files in the order in which tests were collected, those of a server as one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return server_of(self.config.rootpath / file) or file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Shared(config, log)
