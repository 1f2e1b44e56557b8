"""A publisher that is killed at every single point where its store could be left half way."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

from registry_parts.crew import Crew, Member
from registry_parts.subjects import NAME, Outcome, fetch_all, promote, publish, versions

from infra.registry import Registry
from infra.settings import Settings

# Starts the publisher of one seed, to be killed at the nth point.
Start = Callable[[int, int], Member]


def cut_everywhere(registry: Registry, start: Start, folder: Path) -> Outcome:
    """Kill at the first point, the second, ... until a publisher comes through; `operations` counts the cuts.

    Each publishes a new version and promotes it. After each cut, readers must find what was there before, whole, and at
    most the new version and the move to it. A third are then repeated, the others left to the collector.
    """
    outcome = Outcome()
    kept, moves = versions(registry), registry.history(NAME, kind="adapter")
    for point in count(1):
        code = start(point, point).wait()
        seen, history = versions(registry), registry.history(NAME, kind="adapter")
        new, moved = seen[len(kept) :], [entry.version for entry in history[len(moves) :]]
        if seen[: len(kept)] != kept or [record.seed for record in new] not in ([], [point]):
            outcome.wrong.append(f"cut {point}: {kept} became {seen}")
        if history[: len(moves)] != moves or moved not in ([], [record.version for record in new]):
            outcome.wrong.append(f"cut {point}: {moves} became {history}")
        fetch_all(registry, new)
        if point % 3 == 1:
            record = publish(registry, folder, point)
            entry = promote(registry, record)
            # the next reading tells whether that is so
            seen, history = [*kept, record], [*moves, entry]
        kept, moves = seen, history
        if code == 0:
            break
        if code != -9:
            outcome.wrong.append(f"cut {point}: the publisher ended with {code}")
        outcome.operations += 1
    outcome.judge(registry, {record.seed for record in kept})
    if registry.history(NAME, kind="adapter") != moves:
        outcome.wrong.append(f"the history is not {moves}")
    return outcome


def on_disk(crew: Crew, settings: Settings) -> Start:
    """Before the nth thing that is asked of the file system."""
    return lambda seed, nth: crew.publish(settings, [seed], die_at=nth, promote=True)


def on_the_line(crew: Crew, settings: Settings, proxy: Any) -> Start:
    """In the middle of the first request that writes, after it was done, in the middle of the second, ...

    `proxy` is a FaultProxy, and what the settings name.
    """
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
        members.append(crew.publish(settings, [seed], promote=True))
        started.set()
        return members[0]

    return start


def _writes() -> Iterator[tuple[str, int]]:
    for write in count(1):
        yield "cut-upload", write
        yield "swallow", write
