"""The version log finds the newest without listing, and lists without reading."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.manifests import AdapterRecord
from infra.registry import Registry
from infra.versions import VersionLog

BENCH = Path(__file__).parents[1] / "bench"


def test_the_newest_is_found_with_a_number_of_requests_that_grows_like_the_logarithm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCH)
    listing = importlib.import_module("registry_parts.listing")
    for versions in (1, 7, 200):
        figures = listing.measure(versions, repeats=1)
        assert figures["versions"] == versions
        assert figures["newest_requests"] <= 2 * math.log2(versions + 1) + 2
        assert figures["newest_listings"] == 0


def test_versions_are_listed_with_size_and_age_and_strays_are_not(
    registry: Registry, publish: Callable[..., AdapterRecord]
):
    records = [publish(registry, seed) for seed in range(3)]
    for stray in ("notes.json", "7.json", "old/000001.json", "000009.txt"):
        registry.store.create(f"adapters/colour/versions/{stray}", b"{}")
    log = VersionLog(registry.store, AdapterRecord, "adapters/colour")
    listed = log.listed()
    assert list(listed) == [1, 2, 3]
    assert [listed[record.version].size for record in records] == [
        len(registry.store.read(log.path(record.version))) for record in records
    ]
    assert log.read_all() == records
