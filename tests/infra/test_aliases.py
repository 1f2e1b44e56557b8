"""Aliases: compare-and-swap with one winner, and a history that forgets nothing."""

import pickle
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.errors import AliasMovedError, ConflictError, IntegrityError, RegistryError, UnknownRecordError
from infra.manifests import AdapterRecord
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

VERSIONS = 5
Publish = Callable[..., AdapterRecord]


@pytest.fixture
def registry(settings: Settings, publish: Publish) -> Registry:
    """A registry with VERSIONS versions of the adapter `colour`."""
    registry = Registry(open_store(settings=settings))
    for seed in range(VERSIONS):
        publish(registry, seed)
    return registry


def promote(registry: Registry, version: int, **options):
    return registry.promote("colour", version, actor="test", reason=f"to {version}", kind="adapter", **options)


def rollback(registry: Registry):
    return registry.rollback("colour", actor="test", reason="back", kind="adapter")


def test_an_alias_moves_and_remembers(registry: Registry):
    for seq, version in enumerate((2, 5, 1), start=1):
        entry = promote(registry, version)
        assert (entry.version, entry.seq, entry.actor, entry.reason) == (version, seq, "test", f"to {version}")
        assert registry.get_adapter("colour@champion").version == version
        assert entry.digest == registry.get_adapter(f"colour@{version}").digest
    assert [entry.version for entry in registry.history("colour", kind="adapter")] == [2, 5, 1]
    assert registry.aliases("colour", "adapter") == {"champion": entry}


def test_moving_an_alias_to_where_it_is_is_no_move(registry: Registry):
    entry = promote(registry, 3)
    assert promote(registry, 3) == entry
    assert len(registry.history("colour", kind="adapter")) == 1


def test_aliases_are_independent(registry: Registry):
    promote(registry, 1)
    promote(registry, 2, alias="candidate")
    assert registry.get_adapter("colour@champion").version == 1
    assert registry.get_adapter("colour@candidate").version == 2
    assert registry.alias_names("colour", "adapter") == ["candidate", "champion"]


def test_rollbacks_in_a_row_walk_back_through_the_history(registry: Registry):
    for version in (1, 2, 3):
        promote(registry, version)
    assert rollback(registry).version == 2
    assert rollback(registry).version == 1
    with pytest.raises(UnknownRecordError, match="no version before 1"):
        rollback(registry)
    promote(registry, 4)
    assert rollback(registry).version == 3
    assert [entry.version for entry in registry.history("colour", kind="adapter")] == [1, 2, 3, 2, 1, 4, 3]


def test_a_rollback_of_an_alias_that_was_never_set_is_refused(registry: Registry):
    with pytest.raises(UnknownRecordError, match="was never set"):
        rollback(registry)


@pytest.mark.parametrize("alias", ["7", "latest"])
def test_an_alias_that_would_be_mistaken_for_a_version_is_refused(registry: Registry, alias: str):
    with pytest.raises(RegistryError, match="is reserved"):
        promote(registry, 1, alias=alias)


def test_who_expects_another_move_is_told_which_holds(registry: Registry):
    promote(registry, 1, expected_seq=0)
    promote(registry, 2, expected_seq=1)
    with pytest.raises(AliasMovedError, match=r"expected move 1, it is now version 2 \(move 2 by test\)") as caught:
        promote(registry, 3, expected_seq=1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert registry.get_adapter("colour@champion").version == 2


def test_a_race_has_one_winner_and_typed_losers(settings: Settings, registry: Registry):
    for round_number in range(5):
        barrier = threading.Barrier(VERSIONS)

        def move(version: int, seen: int = round_number, barrier: threading.Barrier = barrier) -> int | None:
            mine = Registry(open_store(settings=settings))
            barrier.wait()
            try:
                return promote(mine, version, alias="raced", expected_seq=seen).version
            except AliasMovedError:
                return None

        versions = [(n + round_number) % VERSIONS + 1 for n in range(VERSIONS)]
        with ThreadPoolExecutor(VERSIONS) as pool:
            winners = [version for version in pool.map(move, versions) if version]
        history = registry.history("colour", "raced", "adapter")
        # whoever asks for the version that already holds makes no move, and neither wins nor loses
        before = history[-2].version if len(history) > 1 else None
        assert [version for version in winners if version != before] == [history[-1].version]
        assert [entry.seq for entry in history] == list(range(1, round_number + 2))


@pytest.mark.parametrize("moved_on", [False, True])
def test_a_move_whose_reply_was_lost_counts_even_when_others_followed(registry: Registry, moved_on: bool):
    """The store refuses the repeated write of a move that did take place, as S3 does after a lost reply."""
    promote(registry, 1)
    store = registry.store
    honest = store.replace

    def lossy(path: str, data: bytes, etag: str) -> None:
        store.replace = honest
        honest(path, data, etag)
        if moved_on:
            promote(registry, 3)
        raise ConflictError("the object is no longer the one that was read")

    store.replace = lossy
    assert (promote(registry, 2).seq, registry.get_adapter("colour@champion").version) == (2, 3 if moved_on else 2)
    assert [entry.version for entry in registry.history("colour", kind="adapter")] == [1, 2, 3][: 2 + moved_on]


def test_a_changed_alias_is_refused(registry: Registry):
    promote(registry, 1)
    promote(registry, 2)
    path = "adapters/colour/aliases/champion.json"
    data, etag = registry.store.read_tagged(path)
    registry.store.replace(path, data.replace(b"to 2", b"to 3"), etag)
    with pytest.raises(IntegrityError, match=r"champion\.json is damaged"):
        registry.get_adapter("colour@champion")
    registry.store.delete("adapters/colour/aliases/champion/000001.json")
    registry.store.replace(path, data, registry.store.head(path) or secrets.token_hex())
    with pytest.raises(IntegrityError, match=r"000001\.json is missing"):
        registry.history("colour", kind="adapter")
