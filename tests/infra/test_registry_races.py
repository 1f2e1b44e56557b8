"""Publishers that race, and publishers that are killed: no version lost, none twice, none torn."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.doctor import examine
from infra.manifests import AdapterFacts
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

WRITERS = 4
ROUNDS = 3
KILLS = 5

PUBLISHER = """
import json, sys
from pathlib import Path
from infra.manifests import AdapterFacts
from infra.registry import Registry
from infra.storage import open_store
directory, facts, seeds = Path(sys.argv[1]), AdapterFacts(**json.loads(sys.argv[2])), json.loads(sys.argv[3])
registry = Registry(open_store())
registry.names("adapter")
print("ready", flush=True)
sys.stdin.readline()
for seed in seeds:
    record = registry.publish_adapter("colour", directory, facts.model_copy(update={"seed": seed}))
    print(seed, record.version, flush=True)
"""


def start_publisher(settings: Settings, directory: Path, facts: AdapterFacts, seeds: list[int]) -> subprocess.Popen:
    secret = settings.s3_secret.get_secret_value() if settings.s3_secret else ""
    environment = {
        "DIFFUSION_BLEND_STORE_URL": settings.store_url,
        "DIFFUSION_BLEND_S3_ENDPOINT_URL": settings.s3_endpoint_url or "",
        "DIFFUSION_BLEND_S3_KEY": settings.s3_key or "",
        "DIFFUSION_BLEND_S3_SECRET": secret,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(directory), facts.model_dump_json(), str(seeds)],
        env=os.environ | {name: value for name, value in environment.items() if value},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


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
    for round_number in range(ROUNDS):
        barrier = threading.Barrier(WRITERS)
        # half of the writers publish one content between them, the others one each
        seeds = [100 * round_number + max(0, writer - WRITERS // 2) for writer in range(WRITERS)]

        def attempt(seed: int, barrier: threading.Barrier = barrier) -> tuple[int, int]:
            mine = Registry(open_store(settings=settings))
            barrier.wait()
            record = mine.publish_adapter("colour", directory, facts.model_copy(update={"seed": seed}))
            return record.seed, record.version

        with ThreadPoolExecutor(WRITERS) as pool:
            told = list(pool.map(attempt, seeds))
        visible = published(registry)
        assert set(told) <= set(visible)
        assert len(visible) == (round_number + 1) * len(set(seeds))
        assert len({seed for seed, _ in visible}) == len(visible)


@pytest.mark.slow
def test_processes_that_publish_the_same_content_in_other_orders_leave_one_gapless_line(
    settings: Settings, adapter_dir: Callable[..., Path], facts: AdapterFacts
):
    orders = [list(range(6)), list(range(5, -1, -1)), [*range(3, 6), *range(3)]]
    publishers = [start_publisher(settings, adapter_dir(), facts, order) for order in orders]
    for publisher in publishers:
        assert publisher.stdin is not None
        publisher.stdin.write("go\n")
        publisher.stdin.flush()
    told = [line for publisher in publishers for line in publisher.communicate()[0].splitlines()]
    assert [publisher.returncode for publisher in publishers] == [0, 0, 0]
    visible = published(Registry(open_store(settings=settings)))
    assert sorted(seed for seed, _ in visible) == list(range(6))
    assert {tuple(map(int, line.split())) for line in told} == set(visible)


@pytest.mark.slow
def test_publishers_killed_at_random_points_tear_nothing_and_repeat_nothing(
    settings: Settings, adapter_dir: Callable[..., Path], facts: AdapterFacts
):
    """Each publisher begins again with what the killed ones before it published, or were about to."""
    registry = Registry(open_store(settings=settings))
    moments = random.Random(0)
    visible: list[tuple[int, int]] = []
    for _ in range(KILLS):
        publisher = start_publisher(settings, adapter_dir(), facts, list(range(1000)))
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        publisher.stdin.write("go\n")
        publisher.stdin.flush()
        lines = [publisher.stdout.readline() for _ in range(len(visible) + 1)]
        time.sleep(moments.uniform(0.0, 0.1))
        publisher.kill()
        # a line that the kill cut short was never told
        lines += [line for line in publisher.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        assert publisher.returncode == -9
        assert examine(registry) == []
        before, visible = visible, published(registry)
        assert {(int(seed), int(version)) for seed, version in map(str.split, lines)} <= set(visible)
        assert visible[: len(before)] == before
        assert [seed for seed, _ in visible] == list(range(len(visible)))
    assert len(visible) >= KILLS
