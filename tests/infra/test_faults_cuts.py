"""A publish cut at every point where it writes: invisible or whole, and nothing but orphans for the collector."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import infra.gc
from infra.blobs import blob_path
from infra.doctor import examine
from infra.gc import collect
from infra.intents import FOLDER
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

pytestmark = pytest.mark.slow
TOMORROW = timedelta(days=2)
# hold, weights, card, note of the content, manifest, release of the hold, last move filed, alias: each cut half way and
# after it was done
CUTS_ON_THE_LINE = 16


def collect_orphans(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of dead publishers are held for a day; then exactly what no manifest names goes."""
    records = registry.versions("colour", "adapter")
    referenced = {blob_path(file.sha256) for record in records for file in record.files}
    before = set(registry.store.list("blobs"))
    assert before > referenced
    now = datetime.now(UTC) + TOMORROW
    collect(registry, now=now, delete=True)
    assert set(registry.store.list("blobs")) == before
    # the store's own stamps say how old a hold is: they cannot be set forward
    monkeypatch.setattr(infra.gc, "HOLD_LIFETIME", timedelta(seconds=-60))
    collect(registry, now=now, delete=True)
    assert set(registry.store.list("blobs")) == referenced
    assert registry.store.list(FOLDER) == []
    assert registry.versions("colour", "adapter") == records
    assert examine(registry) == []


@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_a_publisher_killed_before_anything_it_asks_of_its_disk(
    settings: Settings, registry: Registry, crew, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cuts = parts("cuts")
    outcome = cuts.cut_everywhere(registry, cuts.on_disk(crew, settings), tmp_path / "work")
    assert (outcome.wrong, outcome.lost, outcome.duplicated) == ([], 0, 0)
    # an object is opened, linked and unlinked, and its folder opened: five objects at the least
    assert outcome.operations >= 20
    assert list((tmp_path / "store").rglob(".unfinished-*"))
    collect_orphans(registry, monkeypatch)
    assert not list((tmp_path / "store").rglob(".unfinished-*"))


@pytest.mark.parametrize("settings", ["s3"], indirect=True)
def test_a_publisher_killed_in_the_middle_of_each_request_that_writes_and_after_it(
    settings: Settings, registry: Registry, proxy, crew, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cuts = parts("cuts")
    through = settings.model_copy(update={"s3_endpoint_url": proxy.url})
    outcome = cuts.cut_everywhere(registry, cuts.on_the_line(crew, through, proxy), tmp_path / "work")
    assert (outcome.wrong, outcome.lost, outcome.duplicated) == ([], 0, 0)
    assert outcome.operations >= CUTS_ON_THE_LINE
    assert proxy.injected == outcome.operations
    collect_orphans(registry, monkeypatch)
    assert open_store(settings=settings).list("blobs") == registry.store.list("blobs")
