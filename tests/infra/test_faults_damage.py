"""Any object of a registry, damaged in any way: refused by name where it is needed, and the rest goes on working."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.doctor import examine
from infra.errors import InfraError, IntegrityError
from infra.manifests import AdapterFacts, AdapterRecord
from infra.registry import Registry
from infra.storage import Store, open_store

SEEDS = range(3)
View = Callable[[], Any]


@pytest.fixture
def root(tmp_path: Path, publish: Callable[..., AdapterRecord], facts: AdapterFacts) -> Path:
    """A local registry with adapters, bundles and an alias that has moved."""
    registry = Registry(open_store(str(tmp_path / "store")))
    records = [publish(registry, seed) for seed in SEEDS]
    for chosen in (records[:1], records[1:]):
        registry.publish_bundle("sprites", facts.base, {f"basis-{record.seed}": record for record in chosen})
    for version in (1, 2, 1):
        registry.promote("sprites", version, actor="test", reason="x")
    return tmp_path / "store"


def flipped(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def damages(data: bytes, generator: random.Random) -> list[bytes]:
    """The object with one bit changed, twice over, cut short, emptied, and with something after its end."""
    return [*(flipped(data, generator) for _ in range(2)), data[: len(data) // 2], b"", data + b"\0"]


def views(registry: Registry, folder: Path) -> dict[str, View]:
    """Everything that can be asked of the registry, by the name of what is asked for."""

    def fetched(version: int) -> dict[str, bytes]:
        shutil.rmtree(folder, ignore_errors=True)
        registry.fetch(registry.get_adapter(f"colour@{version}"), folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def bundle(ref: str) -> Any:
        record = registry.get(ref)
        return record, registry.adapters_of(record)

    return {
        **{f"colour@{seed + 1}": lambda version=seed + 1: fetched(version) for seed in SEEDS},
        "sprites@1": lambda: bundle("sprites@1"),
        "sprites@2": lambda: bundle("sprites@2"),
        "sprites@champion": lambda: bundle("sprites@champion"),
        "history": lambda: registry.history("sprites"),
    }


def needed(store: Store, asked: dict[str, View], whole: dict[str, Any]) -> dict[str, set[str]]:
    """View -> the objects it stands on, found by taking each away."""
    needs: dict[str, set[str]] = {}
    for path in store.list(""):
        data = store.read(path)
        store.delete(path)
        for name, view in asked.items():
            if answer(view) != whole[name]:
                needs.setdefault(name, set()).add(path)
        store.create(path, data)
    return needs


def answer(view: View) -> Any:
    try:
        return view()
    except InfraError as error:
        return error


def overwrite(store: Store, path: str, data: bytes) -> None:
    store.delete(path)
    store.create(path, data)


def test_what_does_not_stand_on_a_damaged_object_is_as_before_and_what_does_is_refused_by_name(root: Path):
    store, generator = open_store(str(root)), random.Random(0)
    asked = views(Registry(store), root.parent / "seen")
    whole = {name: view() for name, view in asked.items()}
    needs = needed(store, asked, whole)
    paths = [path for path in store.list("") if "/contents/" not in path]
    assert set().union(*needs.values()) == set(paths)
    for path in paths:
        data = store.read(path)
        stem = re.escape(path.rsplit("/", 1)[-1])
        for damaged in damages(data, generator):
            overwrite(store, path, damaged)
            for name, view in asked.items():
                found = answer(view)
                if path not in needs[name]:
                    assert found == whole[name], f"{name} with {path} damaged"
                else:
                    assert isinstance(found, InfraError), f"{name} with {path} damaged: {damaged!r}"
                    assert re.search(stem, str(found)), f"{found} does not name {path}"
            assert any(re.search(stem, finding.problem) for finding in examine(Registry(store)))
        overwrite(store, path, data)
    assert examine(Registry(store)) == []


def test_a_damaged_note_of_a_content_makes_no_second_version_and_no_gap(
    root: Path, publish: Callable[..., AdapterRecord]
):
    """One changed bit in a version number would, were it believed."""
    store, generator = open_store(str(root)), random.Random(0)
    registry = Registry(store)

    def publish_all() -> list[int]:
        return [publish(registry, seed).version for seed in SEEDS]

    notes = {path: store.read(path) for path in store.list("adapters/colour/contents")}
    assert len(notes) == len(SEEDS)
    for path, data in notes.items():
        positions = [(index, bit) for index in range(len(data)) for bit in range(8)]
        # every bit of the number, some of the rest
        number = data.index(b'"version":') + len(b'"version":')
        chosen = [(number, bit) for bit in range(8)] + generator.sample(positions, 8)
        for index, bit in chosen:
            changed = bytearray(data)
            changed[index] ^= 1 << bit
            overwrite(store, path, bytes(changed))
            with pytest.raises(IntegrityError, match=re.escape(path)):
                publish_all()
            assert [finding.where for finding in examine(registry)] == [f"{store.url}/{path}"]
        overwrite(store, path, data)
        assert publish_all() == [1, 2, 3]


def test_notes_of_earlier_software_count_unless_they_would_make_a_gap(
    root: Path, publish: Callable[..., AdapterRecord]
):
    store = open_store(str(root))
    registry = Registry(store)
    path = store.list("adapters/colour/contents")[0]
    own = next(seed for seed in SEEDS if f'"version":{seed + 1}'.encode() in store.read(path))
    overwrite(store, path, f'{{"version": {own + 1}}}'.encode())
    assert publish(registry, own).version == own + 1
    overwrite(store, path, b'{"version": 9}')
    with pytest.raises(IntegrityError, match=r"is damaged, or version 8 is missing"):
        publish(registry, own)
    assert len(registry.versions("colour", "adapter")) == len(SEEDS)
