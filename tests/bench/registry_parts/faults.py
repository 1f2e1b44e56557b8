"""Operations on a registry while a share of all requests fails: each is repeated until it succeeds, and counts once."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from registry_parts.subjects import BASE, NAME, Outcome, publish, versions

from infra.errors import StoreError
from infra.registry import Registry

T = TypeVar("T")
# A publish is some forty calls of a store: with a tenth of them failing, one in fifty goes through whole.
MAX_REPEATS = 1_000
BUNDLE = "sprites"
# How often each comes up; the first two publish.
OPERATIONS = {"publish": 5, "bundle": 1, "publish_again": 2, "promote": 2, "fetch": 2}


class Operator:
    """One user of a registry that fails now and then, and what must be true in the end."""

    def __init__(self, registry: Registry, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.registry, self.folder = registry, folder
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self.versions: dict[int, int] = {}  # seed -> version told
        self.bundles: dict[tuple[int, ...], int] = {}
        self.moves: list[int] = []  # versions that the alias was moved to
        self.say = say

    def work(self, operations: int) -> None:
        for number in range(operations):
            drawn = self.random.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
            getattr(self, f"_{drawn if self.versions else 'publish'}")()
            self.outcome.operations += 1
            self.say(f"{number + 1} of {operations}: {drawn}")

    def judge(self, honest: Registry) -> Outcome:
        """Compare what was told with what the store holds, read without faults."""
        outcome = self.outcome
        outcome.judge(honest, set(self.versions))
        bundles = honest.versions(BUNDLE) if self.bundles else []
        outcome.lost += len(set(self.bundles.values()) - {bundle.version for bundle in bundles})
        outcome.duplicated += len(bundles) - len({bundle.content_sha256 for bundle in bundles})
        seen = {record.seed: record.version for record in versions(honest)}
        if seen != self.versions:
            outcome.wrong.append(f"told {self.versions}, there is {seen}")
        moved = [entry.version for entry in honest.history(NAME, kind="adapter")]
        if moved != self.moves:
            outcome.wrong.append(f"the alias was moved to {self.moves}, its history says {moved}")
        return outcome

    def _publish(self) -> None:
        self._land(len(self.versions))

    def _publish_again(self) -> None:
        self._land(self.random.randrange(len(self.versions)))

    def _land(self, seed: int) -> None:
        version = self._repeat(lambda: publish(self.registry, self.folder, seed).version)
        if self.versions.setdefault(seed, version) != version:
            self.outcome.wrong.append(f"seed {seed} is version {self.versions[seed]} and {version}")

    def _bundle(self) -> None:
        chosen = tuple(sorted(self.random.sample(sorted(self.versions.values()), min(2, len(self.versions)))))

        def make() -> int:
            adapters = {f"basis-{n}": self.registry.get_adapter(f"{NAME}@{v}") for n, v in enumerate(chosen)}
            return self.registry.publish_bundle(BUNDLE, BASE, adapters).version

        version = self._repeat(make)
        if self.bundles.setdefault(chosen, version) != version:
            self.outcome.wrong.append(f"bundle {chosen} is version {self.bundles[chosen]} and {version}")

    def _promote(self) -> None:
        version = self.random.choice(sorted(self.versions.values()))
        reason = f"operation {self.outcome.operations}"
        self._repeat(lambda: self.registry.promote(NAME, version, actor="test", reason=reason, kind="adapter"))
        if self.moves[-1:] != [version]:
            self.moves.append(version)

    def _fetch(self) -> None:
        version = self.random.choice(sorted(self.versions.values()))

        def fetch() -> None:
            with tempfile.TemporaryDirectory() as directory:
                self.registry.fetch(self.registry.get_adapter(f"{NAME}@{version}"), Path(directory) / "fetched")

        self._repeat(fetch)

    def _repeat(self, operation: Callable[[], T]) -> T:
        """What its user does on a StoreError: the same again. Any other error goes through."""
        for _ in range(MAX_REPEATS):
            try:
                return operation()
            except StoreError as error:
                self.outcome.repeats += 1
                self.outcome.refusals[type(error).__name__] += 1
        raise AssertionError(f"failed {MAX_REPEATS} times in a row")


def operate(
    faulty: Registry,
    honest: Registry,
    folder: Path,
    operations: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Do this many operations through `faulty`, then judge through `honest`, which sees the same store whole."""
    operator = Operator(faulty, folder, seed, say)
    operator.work(operations)
    return operator.judge(honest)
