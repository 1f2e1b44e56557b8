"""Manifests across versions of this software: the new reads old records, the old reads what uses nothing new."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from blend.sprites import REGISTRY_PATH
from infra.cards import adapter_card
from infra.manifests import AdapterFacts, AdapterRecord, content_sha256, unseal
from infra.registry import Registry
from infra.storage import open_store

SHIPPED = sorted(Path(REGISTRY_PATH).glob("adapters/*/versions/*.json"))


@pytest.mark.parametrize(
    ("ref", "kl_target", "count"), [("sprites@1", None, 3), ("sprites@champion", 450.0, 3), ("sprites-six@1", 450.0, 6)]
)
def test_the_shipped_registry_loads(ref: str, kl_target: float | None, count: int):
    registry = Registry(open_store(str(Path(REGISTRY_PATH).absolute())), read_only=True)
    adapters = registry.adapters_of(registry.get_bundle(ref))
    assert [record.kl_target for record in adapters.values()] == [kl_target] * count


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parts[-3])
def test_an_older_manifest_is_the_same_content_today(path):
    record = unseal(AdapterRecord, path.read_bytes(), str(path))
    written = json.loads(path.read_text())
    assert record.model_dump(mode="json").keys() == written.keys()
    assert content_sha256(record.model_dump(mode="json")) == content_sha256(written)


def test_kl_target_is_written_where_there_is_one(facts: AdapterFacts, registry: Registry, adapter_dir):
    fixed = registry.publish_adapter("colour", adapter_dir(), facts)
    held = registry.publish_adapter("colour", adapter_dir(), facts.model_copy(update={"kl_target": 60.0}))
    raw = [json.loads(registry.store.read(f"adapters/colour/versions/{v:06d}.json")) for v in (1, 2)]
    assert ["kl_target" in manifest for manifest in raw] == [False, True]
    assert (fixed.kl_target, held.kl_target, held.version) == (None, 60.0, 2)
    assert registry.get_adapter("colour@2") == held
    assert AdapterRecord.model_validate(held.model_dump(mode="json")) == held
    assert "moved to hold the path KL at 60 nats" in adapter_card("colour", held)
    assert "moved" not in adapter_card("colour", fixed)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_kl_target_is_a_positive_number(facts: AdapterFacts, value):
    with pytest.raises(ValidationError, match="kl_target"):
        AdapterFacts.model_validate({**facts.model_dump(), "kl_target": value})
