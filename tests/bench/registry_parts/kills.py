"""A publisher that is killed at random points, again and again, while a reader looks: never a partial version."""

import random
import tempfile
import threading
import time
from pathlib import Path

from registry_parts.crew import Crew, Member
from registry_parts.subjects import NAME, Outcome, versions

from infra.errors import InfraError
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

# More than one publisher gets done before it is killed.
AHEAD = 40
PATIENCE_S = 120.0


class Reader:
    """Fetches the newest version over and over, in a thread and with a store of its own; notes what is not whole."""

    def __init__(self, settings: Settings) -> None:
        self.reads = 0
        self.torn: list[str] = []
        self._settings = settings
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _read(self) -> None:
        registry = Registry(open_store(settings=self._settings))
        newest = 0
        while not self._done.is_set():
            try:
                if NAME in registry.names("adapter"):
                    newest = self._look(registry, newest)
            except (InfraError, AssertionError) as error:
                self.torn.append(f"{type(error).__name__}: {error}")
            self._done.wait(0.01)

    def _look(self, registry: Registry, newest: int) -> int:
        record = registry.get_adapter(NAME)
        assert record.version >= newest, f"version {newest} is gone, {record.version} is the newest"
        with tempfile.TemporaryDirectory() as directory:
            registry.fetch(record, Path(directory) / "fetched")
        self.reads += 1
        return record.version


def kill_publishers(crew: Crew, settings: Settings, kills: int, seed: int = 0) -> Outcome:
    """Each publisher begins with the content at which the one before it was killed; `operations` counts commits."""
    registry = Registry(open_store(settings=settings))
    moments = random.Random(seed)
    outcome = Outcome()
    told: dict[int, int] = {}
    seconds = 0.1
    seen: list[tuple[int, int]] = []
    with Reader(settings) as reader:
        for number in range(kills):
            first = max(len(seen) - 1, 0)
            publisher = crew.publish(settings, list(range(first, first + AHEAD)))
            # the first may finish one, so that there is something to read
            _await_beginning(publisher, moments.randrange(len(seen), len(seen) + 2) if seen else 1)
            time.sleep(moments.uniform(0, 1.2 * seconds))
            publisher.kill()
            if (code := publisher.wait()) != -9:
                outcome.wrong.append(f"publisher {number} ended with {code}: {publisher.told()[-1:]}")
            lines = publisher.told()
            told |= {line["seed"]: line["version"] for line in lines if "version" in line}
            seconds = _last_duration(lines) or seconds
            before, seen = seen, [(record.seed, record.version) for record in versions(registry)]
            if seen[: len(before)] != before or not told.items() <= dict(seen).items():
                outcome.wrong.append(f"after kill {number}: told {told}, before {before}, now {seen}")
    outcome.operations = len(seen)
    outcome.wrong += reader.torn
    if not reader.reads:
        outcome.wrong.append("the reader saw nothing")
    outcome.judge(registry, set(range(len(seen))))
    outcome.refusals["reads"] = reader.reads
    return outcome


def _await_beginning(publisher: Member, seed: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(line.get("begins") == seed for line in publisher.told()):
        if time.monotonic() > deadline:
            raise AssertionError(f"the publisher never came to seed {seed}: {publisher.told()}")
        time.sleep(0.001)


def _last_duration(lines: list[dict[str, float]]) -> float:
    """Seconds that the last whole publish took; 0 for none."""
    began = {line["begins"]: line["at"] for line in lines if "begins" in line}
    return ([0.0] + [line["at"] - began[line["seed"]] for line in lines if "version" in line])[-1]
