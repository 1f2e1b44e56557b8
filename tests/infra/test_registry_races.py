"""Publishers that race, and publishers that are killed: no version lost, none twice, none torn."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.manifests import AdapterFacts
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

THREADS, THREAD_ROUNDS = 4, 2
# tests/bench/registry.py does 40 rounds and 50 kills
WRITERS, ROUNDS = 16, 2
KILLS = 3


def published(registry: Registry) -> list[tuple[int, int]]:
    """(seed, version) of everything visible, after a check that all of it is whole and gapless."""
    if not registry.names("adapter"):
        return []
    records = registry.versions("colour", "adapter")
    assert [record.version for record in records] == list(range(1, len(records) + 1))
    assert len(registry.store.list("adapters/colour/versions")) == len(records)
    return [(record.seed, record.version) for record in records]


def test_threads_that_publish_the_same_and_other_content_leave_one_gapless_line(
    settings: Settings, adapter_dir: Callable[..., Path], facts: AdapterFacts
):
    registry = Registry(open_store(settings=settings))
    directory = adapter_dir()
    for round_number in range(THREAD_ROUNDS):
        barrier = threading.Barrier(THREADS)
        # half of the writers publish one content between them, the others one each
        seeds = [100 * round_number + max(0, writer - THREADS // 2) for writer in range(THREADS)]

        def attempt(seed: int, barrier: threading.Barrier = barrier) -> tuple[int, int]:
            mine = Registry(open_store(settings=settings))
            barrier.wait()
            record = mine.publish_adapter("colour", directory, facts.model_copy(update={"seed": seed}))
            return record.seed, record.version

        with ThreadPoolExecutor(THREADS) as pool:
            told = list(pool.map(attempt, seeds))
        visible = published(registry)
        assert set(told) <= set(visible)
        assert len(visible) == (round_number + 1) * len(set(seeds))
        assert len({seed for seed, _ in visible}) == len(visible)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_processes_that_publish_the_same_content_in_other_orders_leave_one_gapless_line(settings: Settings, crew):
    orders = [list(range(6)), list(range(5, -1, -1)), [*range(3, 6), *range(3)]]
    publishers = [crew.publish(settings, order) for order in orders]
    assert [publisher.wait() for publisher in publishers] == [0, 0, 0]
    told = [line for publisher in publishers for line in publisher.told() if "version" in line]
    visible = published(Registry(open_store(settings=settings)))
    assert sorted(seed for seed, _ in visible) == list(range(6))
    assert {(line["seed"], line["version"]) for line in told} == set(visible)


@pytest.mark.slow
def test_sixteen_processes_publish_the_same_and_move_one_alias_with_one_winner_a_round(settings: Settings, crew, parts):
    outcome = parts("races").race(crew, settings, WRITERS, ROUNDS)
    assert (outcome.wrong, outcome.lost, outcome.duplicated) == ([], 0, 0)
    assert outcome.refusals == {"AliasMovedError": (WRITERS - 1) * ROUNDS}


@pytest.mark.slow
def test_publishers_killed_at_random_points_tear_nothing_and_repeat_nothing(settings: Settings, crew, parts):
    """Each publisher begins with the content at which the one before it was killed; a reader looks all the time."""
    outcome = parts("kills").kill_publishers(crew, settings, KILLS)
    assert (outcome.wrong, outcome.lost, outcome.duplicated) == ([], 0, 0)
    assert outcome.operations > 0
