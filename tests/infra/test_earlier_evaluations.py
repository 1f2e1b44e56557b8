"""Which evaluation a new one is held against: the champion's, or for the champion what was there before."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from infra.evaluations import Evaluation, earlier_evaluation
from infra.manifests import AdapterRecord, BundleRecord
from infra.registry import Registry
from infra.storage import open_store

FACTS = {"base": "sprites", "rewards": {"bright": "1"}, "adapters": {"bright": "brightness"}, "steps": 20}


def store(registry: Registry, bundle: BundleRecord, digit: str, hour: int = 12, **changes: Any) -> Evaluation:
    """Store a finished evaluation of this digest and hour; `changes` are those of its facts."""
    facts = FACTS | {"date": f"2026-11-23 {hour:02}:00 UTC", "bundle": bundle.ref} | changes
    front = {"front": "mpa", "hypervolume": 9.0, "hypervolume_low": 8.0, "hypervolume_high": 10.0}
    summary = {"facts": facts, "hypervolumes": [front], "cells": []}
    path = f"evaluations/{bundle.digest}/{digit * 64}"
    registry.store.create(f"{path}/summary.json", json.dumps(summary).encode())
    return Evaluation(digit * 64, path, summary)


@pytest.fixture
def bundles(registry: Registry, publish: Callable[..., AdapterRecord]) -> list[BundleRecord]:
    """Three versions of a bundle, of different adapters; nothing is the champion."""
    records = [publish(registry, seed) for seed in range(3)]
    return [registry.publish_bundle("sprites", record.base, {"bright": record}) for record in records]


def test_nothing_without_a_champion(registry: Registry, bundles: list[BundleRecord]):
    store(registry, bundles[0], "a")
    assert earlier_evaluation(registry, bundles[1], store(registry, bundles[1], "b")) is None


def test_the_champions_newest_comparable_one(registry: Registry, bundles: list[BundleRecord]):
    champion, bundle, _ = bundles
    registry.promote("sprites", 1, actor="tests", reason="first")
    evaluation = store(registry, bundle, "b")
    assert earlier_evaluation(registry, bundle, evaluation) is None
    store(registry, champion, "c", hour=20, steps=50)
    store(registry, champion, "d", hour=20, adapters={"bright": "warmth"})
    assert earlier_evaluation(registry, bundle, evaluation) is None
    store(registry, champion, "e", hour=9)
    store(registry, champion, "f", hour=15)
    found = earlier_evaluation(registry, bundle, evaluation)
    assert found is not None
    assert (found.evaluation.digest[0], found.bundle, found.role) == ("f", champion, "the champion")


def test_the_champion_is_held_against_itself_before_and_else_against_the_champion_before_it(
    registry: Registry, bundles: list[BundleRecord]
):
    first, second, third = bundles
    for version in (1, 2, 3):
        registry.promote("sprites", version, actor="tests", reason="better")
    store(registry, first, "a")
    evaluation = store(registry, third, "b")
    assert earlier_evaluation(registry, third, evaluation) is None
    store(registry, second, "c")
    found = earlier_evaluation(registry, third, evaluation)
    assert found is not None
    assert (found.evaluation.digest[0], found.bundle.ref, found.role) == ("c", "sprites@2", "the champion before it")
    store(registry, third, "d", hour=13)
    store(registry, third, "e", hour=11)
    found = earlier_evaluation(registry, third, evaluation)
    assert found is not None
    assert (found.evaluation.digest[0], found.bundle, found.role) == ("e", third, "the champion, evaluated before")


def test_another_store_is_looked_in_as_well(registry: Registry, bundles: list[BundleRecord], tmp_path):
    champion, bundle, _ = bundles
    registry.promote("sprites", 1, actor="tests", reason="first")
    own = Registry(open_store(f"file://{tmp_path}/own"))
    store(own, champion, "a")
    evaluation = store(own, bundle, "b")
    assert earlier_evaluation(registry, bundle, evaluation) is None
    found = earlier_evaluation(registry, bundle, evaluation, own.store)
    assert found is not None
    assert found.evaluation.digest[0] == "a"
