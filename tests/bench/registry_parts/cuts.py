"""A publisher that is killed at every single point where its store could be left half way."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

from registry_parts.crew import Crew, Member
from registry_parts.subjects import Outcome, fetch_all, publish, versions

from infra.registry import Registry
from infra.settings import Settings

# Starts the publisher of one seed, to be killed at the nth point.
Start = Callable[[int, int], Member]


def cut_everywhere(registry: Registry, start: Start, folder: Path) -> Outcome:
    """Kill at the first point, the second, ... until a publisher comes through; `operations` counts the cuts.

    After each, readers must find what was there before, whole, and at most the new version; half of the cut publishes
    are then repeated, the others left behind for the garbage collector.
    """
    outcome = Outcome()
    seen = versions(registry)
    for point in count(1):
        code = start(point, point).wait()
        before, seen = seen, versions(registry)
        new = seen[len(before) :]
        if seen[: len(before)] != before or [record.seed for record in new] not in ([], [point]):
            outcome.wrong.append(f"cut {point}: {before} became {seen}")
        fetch_all(registry, new)
        if point % 2:
            record = publish(registry, folder, point)
            if record.version != len(before) + 1:
                outcome.wrong.append(f"cut {point}: repeated, it is version {record.version} after {len(before)}")
            seen = versions(registry)
        if code == 0:
            break
        if code != -9:
            outcome.wrong.append(f"cut {point}: the publisher ended with {code}")
        outcome.operations += 1
    outcome.judge(registry, {record.seed for record in seen})
    return outcome


def on_disk(crew: Crew, settings: Settings) -> Start:
    """Before the nth thing that is asked of the file system."""
    return lambda seed, nth: crew.publish(settings, [seed], die_at=nth)


def on_the_line(crew: Crew, settings: Settings, proxy: Any) -> Start:
    """In the middle of the nth half-request that writes, and after it was done: `proxy` is a FaultProxy."""
    points = _writes()
    faults: list[tuple[str, int]] = []

    def start(seed: int, nth: int) -> Member:
        while len(faults) < nth:
            faults.append(next(points))
        fault, write = faults[nth - 1]
        started = Event()
        members: list[Member] = []

        def kill() -> None:
            started.wait()
            members[0].kill()

        proxy.rules[:] = []
        proxy.inject(fault, lambda request: request.method in ("PUT", "POST", "DELETE"), nth=write, then=kill)
        members.append(crew.publish(settings, [seed]))
        started.set()
        return members[0]

    return start


def _writes() -> Iterator[tuple[str, int]]:
    for write in count(1):
        yield "cut-upload", write
        yield "swallow", write
