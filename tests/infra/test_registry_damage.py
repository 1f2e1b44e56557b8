"""A damaged registry: cut uploads stay invisible, changed bytes are refused by name, the rest goes on working."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.artifact_files import matches
from infra.blobs import blob_path
from infra.doctor import examine
from infra.errors import (
    IntegrityError,
    SchemaError,
    StoreUnreachableError,
)
from infra.manifests import (
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    AdapterFacts,
    AdapterRecord,
    seal,
)
from infra.registry import Registry
from infra.storage import Store

AdapterDir = Callable[..., Path]
Publish = Callable[..., AdapterRecord]


def overwrite(store: Store, path: str, data: bytes) -> None:
    store.delete(path)
    store.create(path, data)


@pytest.mark.parametrize("fault", ["cut", "lost"])
def test_a_publish_cut_at_any_write_is_invisible_or_whole_and_can_be_repeated(
    registry: Registry, publish: Publish, parts, tmp_path: Path, fault: str
):
    faults = parts("faulty_store")
    expected, breaks_at, cuts = 0, 0, 0
    while True:
        breaks_at += 1
        breaking = faults.NthWrite(breaks_at, fault)
        seed = 100 + breaks_at
        try:
            publish(Registry(faults.FaultyStore(registry.store, breaking)), seed)
        except StoreUnreachableError:
            cuts += 1
        visible = registry.versions("colour", "adapter") if registry.names("adapter") else []
        for record in visible:
            registry.fetch(record, tmp_path / f"{breaks_at}-{record.version}")
        assert len(visible) in (expected, expected + 1)
        record = publish(registry, seed)
        expected += 1
        assert record.version == expected
        assert [record.seed for record in registry.versions("colour", "adapter")] == [
            100 + n for n in range(1, expected + 1)
        ]
        if breaking.left > 0:
            break
    # the hold, two blobs, the intent and the manifest; a hold that stays behind afterwards is no failure
    assert cuts == 5


def test_damaged_files_are_refused_by_name_and_other_versions_stay_readable(
    registry: Registry, publish: Publish, adapter_dir: AdapterDir, facts: AdapterFacts, tmp_path: Path
):
    bad, good = (publish(registry, seed) for seed in range(2))
    weights = next(file for file in bad.files if file.path == WEIGHTS_FILE)
    path = blob_path(weights.sha256)
    whole = registry.store.read(path)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (bytes(flipped), whole[:-1], whole + b"\0", b""):
        overwrite(registry.store, path, damaged)
        with pytest.raises(IntegrityError, match=rf"{WEIGHTS_FILE} of adapter colour@1 is damaged.*{weights.sha256}"):
            registry.fetch(bad, tmp_path / "bad")
        assert not (tmp_path / "bad").exists()
    with pytest.raises(IntegrityError, match="is damaged: delete it"):
        registry.publish_adapter("colour", adapter_dir(0), facts.model_copy(update={"seed": 5}))
    registry.store.delete(path)
    with pytest.raises(IntegrityError, match="is lost"):
        registry.fetch(bad, tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    registry.fetch(good, tmp_path / "good")


def test_any_changed_byte_of_a_manifest_is_noticed(tmp_path: Path, publish: Publish):
    from infra.storage import open_store

    registry = Registry(open_store(str(tmp_path / "store")))
    first = publish(registry, 0)
    publish(registry, 1)
    path = "adapters/colour/versions/000002.json"
    whole = registry.store.read(path)
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 7
        overwrite(registry.store, path, bytes(changed))
        with pytest.raises((IntegrityError, SchemaError), match=r"000002\.json"):
            registry.get_adapter("colour@2")
    overwrite(registry.store, path, whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match=r"000002\.json is damaged"):
        registry.get_adapter("colour")
    overwrite(registry.store, path, registry.store.read("adapters/colour/versions/000001.json"))
    with pytest.raises(IntegrityError, match="holds the manifest of colour@1"):
        registry.get_adapter("colour")
    assert registry.get_adapter("colour@1") == first


def test_a_replaced_manifest_is_refused_where_a_digest_points_at_it(
    registry: Registry, publish: Publish, facts: AdapterFacts
):
    adapter = publish(registry)
    bundle = registry.publish_bundle("sprites", facts.base, {"bright": adapter})
    registry.promote("sprites", 1, actor="test", reason="first")
    for path in ("adapters/colour/versions/000001.json", "bundles/sprites/versions/000001.json"):
        fields = json.loads(registry.store.read(path))
        overwrite(registry.store, path, seal(fields | {"licence": "other"}))
    with pytest.raises(IntegrityError, match="not the one that bundle sprites@1 names"):
        registry.adapters_of(bundle)
    with pytest.raises(IntegrityError, match="not the one that alias 'champion' was moved to"):
        registry.get("sprites@champion")


def test_a_newer_schema_asks_for_an_upgrade(registry: Registry, publish: Publish):
    publish(registry)
    path = "adapters/colour/versions/000001.json"
    fields = json.loads(registry.store.read(path))
    overwrite(registry.store, path, seal(fields | {"schema_version": SCHEMA_VERSION + 1, "new_field": {}}))
    with pytest.raises(SchemaError, match=r"000001\.json has schema version 3.*reads up to 2: upgrade"):
        registry.get_adapter("colour")


def test_the_cache_serves_without_the_store_and_heals(registry: Registry, publish: Publish, tmp_path: Path):
    record = publish(registry)
    directory = registry.cached(record, tmp_path / "cache")
    blobs = {file.sha256: registry.store.read(blob_path(file.sha256)) for file in record.files}
    for digest in blobs:
        registry.store.delete(blob_path(digest))
    assert registry.cached(record, tmp_path / "cache") == directory
    (directory / WEIGHTS_FILE).write_bytes(b"rotten")
    with pytest.raises(IntegrityError, match="is lost"):
        registry.cached(record, tmp_path / "cache")
    for digest, data in blobs.items():
        registry.store.create(blob_path(digest), data)
    assert registry.cached(record, tmp_path / "cache") == directory
    assert all(matches(directory / file.path, file) for file in record.files)
    assert [path.name for path in (tmp_path / "cache" / "adapters").iterdir()] == [record.digest]


def test_the_doctor_finds_each_kind_of_damage(registry: Registry, publish: Publish, facts: AdapterFacts):
    records = [publish(registry, seed) for seed in range(4)]
    bundle = registry.publish_bundle("sprites", facts.base, {"bright": records[0], "dim": records[3]})
    registry.publish_bundle("sprites", facts.base, {"bright": records[0]})
    registry.promote("sprites", 1, actor="test", reason="x")
    registry.promote("sprites", 2, actor="test", reason="x")
    looked_at: list[str] = []
    assert examine(registry, looked_at.append) == []
    assert looked_at == ["conditional writes", "adapter colour", "bundle sprites"]
    store = registry.store
    weights = [next(file.sha256 for file in record.files if file.path == WEIGHTS_FILE) for record in records]
    overwrite(store, blob_path(weights[0]), b"damaged")
    store.delete(blob_path(weights[1]))
    store.delete("adapters/colour/versions/000003.json")
    overwrite(store, "adapters/colour/versions/000004.json", b"{}")
    store.delete("bundles/sprites/aliases/champion/000001.json")
    found = {finding.where.removeprefix(store.url): finding.problem for finding in examine(registry)}
    assert set(found) == {
        f"{WEIGHTS_FILE} of adapter colour@1",
        f"{WEIGHTS_FILE} of adapter colour@2",
        "/adapters/colour/versions",
        "adapter colour@4",
        f"bundle {bundle.ref}",
        "bundle sprites@champion",
    }
    assert "damaged" in found[f"{WEIGHTS_FILE} of adapter colour@1"]
    assert "lost" in found[f"{WEIGHTS_FILE} of adapter colour@2"]
    assert "[3]" in found["/adapters/colour/versions"]
