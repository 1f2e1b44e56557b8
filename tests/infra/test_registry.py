"""The registry: gapless versions, each content once, readers that see whole records or none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.cards import adapter_card
from infra.errors import (
    ReadOnlyError,
    RegistryError,
    UnknownRecordError,
)
from infra.export import export
from infra.manifests import (
    CARD_FILE,
    WEIGHTS_FILE,
    AdapterFacts,
    AdapterRecord,
    BaseIdentity,
    BundleDefaults,
    Metric,
    Range,
)
from infra.registry import Registry

AdapterDir = Callable[..., Path]
Publish = Callable[..., AdapterRecord]


def test_what_was_published_is_read_back(registry: Registry, adapter_dir: AdapterDir, facts: AdapterFacts, tmp_path):
    full = facts.model_copy(
        update={
            "metrics": {"reward": Metric(value=0.5, low=0.4, high=0.6, n=64)},
            "run_ids": {"prefect": "run-1"},
            "git_commit": "c" * 40,
            "licence": "MIT",
        }
    )
    record = registry.publish_adapter("colour", adapter_dir(), full)
    assert (record.name, record.version, record.ref) == ("colour", 1, "colour@1")
    assert AdapterFacts(**record.model_dump(include=set(AdapterFacts.model_fields))) == full
    assert [file.path for file in record.files] == [CARD_FILE, WEIGHTS_FILE]
    assert registry.get_adapter("colour@1") == registry.get_adapter("colour") == record
    fetched = registry.fetch(record, tmp_path / "fetched")
    assert (fetched / WEIGHTS_FILE).read_bytes() == (adapter_dir() / WEIGHTS_FILE).read_bytes()
    assert (fetched / CARD_FILE).read_text() == adapter_card("colour", full)
    assert "| reward | 0.5 (0.4 to 0.6), n = 64 |" in (fetched / CARD_FILE).read_text()


def test_a_card_of_ones_own_is_kept(registry: Registry, publish: Publish, adapter_dir: AdapterDir, tmp_path: Path):
    (adapter_dir() / CARD_FILE).write_text("# Mine\n")
    record = publish(registry)
    assert (registry.fetch(record, tmp_path / "fetched") / CARD_FILE).read_text() == "# Mine\n"


def test_versions_count_up_and_equal_content_is_one_version(
    registry: Registry, publish: Publish, adapter_dir: AdapterDir, facts: AdapterFacts
):
    records = [publish(registry, seed) for seed in range(5)]
    assert [record.version for record in records] == [1, 2, 3, 4, 5]
    assert registry.store.list("adapters/colour/versions") == [
        f"adapters/colour/versions/{version:06d}.json" for version in range(1, 6)
    ]
    assert [publish(registry, seed) for seed in range(5)] == records
    other_run = facts.model_copy(update={"seed": 2, "run_ids": {"prefect": "a retry"}, "git_commit": "d" * 40})
    assert registry.publish_adapter("colour", adapter_dir(2), other_run) == records[2]
    assert registry.versions("colour", "adapter") == records
    assert registry.get_adapter("colour") == records[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9},
        {"kl_weight": 0.2},
        {"reward": "compressibility"},
        {"reward_version": "2"},
        {"rank": 4},
        {"alpha": 1.0},
        {"licence": "MIT"},
        {"metrics": {"reward": Metric(value=1.0)}},
        {"base": BaseIdentity(source="sprites", sha256="cd" * 32)},
    ],
)
def test_any_other_fact_is_another_version(tmp_path: Path, adapter_dir: AdapterDir, facts: AdapterFacts, change):
    from infra.storage import open_store

    registry = Registry(open_store(str(tmp_path / "store")))
    registry.publish_adapter("colour", adapter_dir(), facts)
    assert registry.publish_adapter("colour", adapter_dir(), facts.model_copy(update=change)).version == 2


def test_a_bundle_holds_its_adapters_by_digest(registry: Registry, publish: Publish, facts: AdapterFacts):
    first, second = (publish(registry, seed) for seed in range(2))
    details = {
        "defaults": BundleDefaults(guidance_scale=3.0, num_inference_steps=20, method="ls", height=64, width=64),
        "weight_ranges": {"bright": Range(low=0.0, high=0.7)},
        "lambda_range": Range(low=0.0, high=2.0),
    }
    bundle = registry.publish_bundle("sprites", facts.base, {"bright": first, "dim": second}, **details)
    assert registry.get("sprites") == registry.get_bundle("sprites@1") == bundle
    assert registry.publish_bundle("sprites", facts.base, {"bright": first, "dim": second}, **details) == bundle
    assert {name: getattr(bundle, name) for name in details} == details
    assert registry.adapters_of(bundle) == {"bright": first, "dim": second}
    assert bundle.adapters["dim"].digest == second.digest
    assert registry.names("bundle") == ["sprites"]
    assert registry.names("adapter") == ["colour"]


def test_a_bundle_that_does_not_fit_together_is_refused(registry: Registry, publish: Publish, facts: AdapterFacts):
    adapter = publish(registry)
    other = BaseIdentity(source="/other/base", sha256="cd" * 32)
    with pytest.raises(RegistryError, match=r"colour@1 \(bright\) was trained on base 'sprites'.*'/other/base'"):
        registry.publish_bundle("sprites", other, {"bright": adapter})
    with pytest.raises(RegistryError, match="at least 1 item"):
        registry.publish_bundle("sprites", facts.base, {})
    with pytest.raises(RegistryError, match="weight_ranges names"):
        registry.publish_bundle(
            "sprites", facts.base, {"bright": adapter}, weight_ranges={"dark": Range(low=0.0, high=1.0)}
        )
    with pytest.raises(RegistryError, match="lamda_range"):
        registry.publish_bundle("sprites", facts.base, {"bright": adapter}, lamda_range=Range(low=0.0, high=1.0))
    with pytest.raises(RegistryError, match="basis name 'Bright'"):
        registry.publish_bundle("sprites", facts.base, {"Bright": adapter})
    with pytest.raises(UnknownRecordError, match="no version 7"):
        registry.publish_bundle("sprites", facts.base, {"bright": adapter.model_copy(update={"version": 7})})
    with pytest.raises(RegistryError, match="another one than was given"):
        registry.publish_bundle("sprites", facts.base, {"bright": adapter.model_copy(update={"digest": "e" * 64})})
    assert registry.names("bundle") == []


BAD_NAMES = ["", "Upper", "-first", ".hidden", "a/b", "../up", "a" * 65, "späce", "a b", "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_before_anything_is_written(
    tmp_path: Path, publish: Publish, adapter_dir: AdapterDir, facts: AdapterFacts, name: str
):
    from infra.storage import open_store

    registry = Registry(open_store(str(tmp_path / "store")))
    adapter = publish(registry)
    before = registry.store.list("")
    for call in (
        lambda: registry.publish_adapter(name, adapter_dir(), facts),
        lambda: registry.publish_bundle(name, facts.base, {"bright": adapter}),
        lambda: registry.get(f"{name}@1"),
        lambda: registry.promote(name, 1, actor="test", reason="x"),
        lambda: registry.promote("colour", 1, name, actor="test", reason="x", kind="adapter"),
        lambda: registry.history(name),
    ):
        with pytest.raises(RegistryError, match="use 1 to 64 lower-case letters"):
            call()
    assert registry.store.list("") == before


def test_what_does_not_exist_is_answered_with_what_does(registry: Registry, publish: Publish, facts: AdapterFacts):
    with pytest.raises(UnknownRecordError, match=r"no bundle 'sprites'.*there are: none yet"):
        registry.get("sprites@champion")
    adapter = publish(registry)
    registry.publish_bundle("sprites", facts.base, {"bright": adapter})
    registry.promote("sprites", 1, "stable", actor="test", reason="x")
    with pytest.raises(UnknownRecordError, match=r"no bundle 'spirits'.*there are: sprites"):
        registry.get("spirits")
    for version in ("0", "2", "99"):
        with pytest.raises(UnknownRecordError, match=f"no version {version} .*versions are 1 to 1"):
            registry.get(f"sprites@{version}")
    with pytest.raises(UnknownRecordError, match=r"no alias 'champion'.*it has: stable"):
        registry.get("sprites@champion")
    with pytest.raises(UnknownRecordError, match="versions are 1 to 1"):
        registry.promote("sprites", 2, actor="test", reason="x")


def test_a_read_only_registry_writes_nothing(registry: Registry, publish: Publish, facts: AdapterFacts):
    adapter = publish(registry)
    closed = Registry(registry.store, read_only=True)
    assert closed.get_adapter("colour") == adapter
    for call in (
        lambda: publish(closed, 1),
        lambda: closed.publish_bundle("sprites", facts.base, {"bright": adapter}),
        lambda: closed.promote("colour", 1, actor="test", reason="x", kind="adapter"),
        lambda: closed.rollback("colour", actor="test", reason="x", kind="adapter"),
        closed.check_writable,
    ):
        with pytest.raises(ReadOnlyError, match="read-only"):
            call()
    assert closed.names("bundle") == []


def test_export_writes_directories_that_diffusers_reads(
    registry: Registry, publish: Publish, adapter_dir: AdapterDir, facts: AdapterFacts, tmp_path: Path
):
    adapter = publish(registry)
    bundle = registry.publish_bundle("sprites", facts.base, {"bright": adapter})
    export(registry, bundle, tmp_path / "out")
    export(registry, adapter, tmp_path / "one")
    for directory in (tmp_path / "out" / "bright", tmp_path / "one"):
        assert (directory / WEIGHTS_FILE).read_bytes() == (adapter_dir() / WEIGHTS_FILE).read_bytes()
        assert (directory / CARD_FILE).is_file()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["digest"] == bundle.digest
    with pytest.raises(RegistryError, match="is not an empty directory"):
        export(registry, adapter, tmp_path / "out")
