"""Checkpoints in directories and stores: one commit, damage, full disks, and where they go."""

import json
import logging
import resource

import pytest

from blend.finetune.checkpoint import ADAPTER_FILE, MANIFEST_FILE, STATE_FILE, CheckpointFolder, read_state
from blend.finetune.errors import CheckpointError, ResumeError
from infra.errors import StoreError, StoreUnreachableError
from infra.local_store import LocalStore
from infra.settings import Settings
from workers.checkpoints import StoredCheckpoints, checkpoint_location, open_checkpoints

CLOCK = {"seconds", "rollout_seconds", "images_per_second"}


def stored(root):
    return sorted(path.relative_to(root).as_posix().split("-")[0] for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_damaged_newest_gives_the_one_before_and_says_so(save, tmp_path, caplog, kind):
    checkpoints = CheckpointFolder(tmp_path / "here")
    if kind == "store":
        checkpoints = StoredCheckpoints(LocalStore(tmp_path / "here"), tmp_path / "cache")
    for iteration in (1, 2, 3):
        save(checkpoints, iteration)
    assert read_state(checkpoints.latest())["iteration"] == 3
    [state] = [path for path in (tmp_path / "here").rglob(STATE_FILE) if "000003" in str(path)]
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    if kind == "store":
        checkpoints = StoredCheckpoints(LocalStore(tmp_path / "here"), tmp_path / "other cache")
    with caplog.at_level(logging.WARNING):
        assert read_state(checkpoints.latest())["iteration"] == 2
    assert "000003" in caplog.text
    assert "damaged (state.pt is not what was written)" in caplog.text
    save(checkpoints, 3)
    assert read_state(checkpoints.latest())["iteration"] == 3


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(save, tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.latest() is None
    (save(folder, 1) / MANIFEST_FILE).write_text("{")
    with pytest.raises(ResumeError, match="none of the 1 checkpoints"):
        folder.latest()


def test_two_are_kept_in_the_store_and_orphans_go(save, tmp_path):
    root = tmp_path / "store"
    (root / "files/000001-0123").mkdir(parents=True)
    (root / "files/000001-0123/state.pt").write_bytes(b"an upload that was cut")
    strays = [root / "files/notes.txt", root / "manifests/.DS_Store"]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"no part of any checkpoint, and left alone")
    checkpoints = StoredCheckpoints(LocalStore(root), tmp_path / "cache")
    for iteration in (1, 2, 3, 4):
        save(checkpoints, iteration)
    assert checkpoints.latest().name == "iteration_000004"
    for stray in strays:
        stray.unlink()
    kept = ["000003", "000003", "000004", "000004"]
    assert stored(root) == [*(f"files/{i}" for i in kept), "manifests/000003", "manifests/000004"]
    manifest = json.loads(next((root / "manifests").glob("000004-*")).read_text())
    assert {name: set(facts) for name, facts in manifest["files"].items()}.pop(STATE_FILE) == {"size", "sha256"}


def test_upload_cut_before_the_manifest_leaves_the_previous(save, tmp_path, impatient):
    class Cut(LocalStore):
        def create(self, path, data):
            if path.startswith("manifests/000002"):
                raise StoreUnreachableError("cut")
            super().create(path, data)

    checkpoints = StoredCheckpoints(Cut(tmp_path / "store"), tmp_path / "cache")
    save(checkpoints, 1)
    with pytest.raises(CheckpointError):
        save(checkpoints, 2)
    assert "files/000002" in stored(tmp_path / "store")
    elsewhere = StoredCheckpoints(LocalStore(tmp_path / "store"), tmp_path / "elsewhere")
    assert read_state(elsewhere.latest())["iteration"] == 1
    # the same machine has it, and brings it up to date
    again = StoredCheckpoints(LocalStore(tmp_path / "store"), tmp_path / "cache")
    assert read_state(again.latest())["iteration"] == 2
    assert "manifests/000002" in stored(tmp_path / "store")


@pytest.mark.parametrize("file", [ADAPTER_FILE, STATE_FILE])
def test_disk_that_is_full_is_named_and_the_previous_kept(save, tmp_path, file):
    folder = CheckpointFolder(tmp_path)
    sizes = {path.name: path.stat().st_size for path in save(folder, 1).iterdir()}
    assert sizes[ADAPTER_FILE] < sizes[STATE_FILE]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[file] - 1, hard))
    try:
        with pytest.raises(CheckpointError, match=r"iteration 2 cannot be written to .*too large.*: make room"):
            save(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_state(folder.latest())["iteration"] == 1


def test_checkpoints_lie_with_the_results_or_with_a_registry_in_s3(tmp_path):
    s3 = Settings(store_url="s3://bucket/registry/", s3_endpoint_url="http://127.0.0.1:9")
    local = Settings(store_url=f"file://{tmp_path}/store")
    assert checkpoint_location("colour-0123", tmp_path, settings=local) == str(tmp_path / "checkpoints")
    assert checkpoint_location("colour-0123", tmp_path, settings=s3) == "s3://bucket/registry/runs/colour-0123"
    assert checkpoint_location("c-1", tmp_path, "s3://other", settings=local) == "s3://other/runs/c-1"
    assert isinstance(open_checkpoints(f"file://{tmp_path}/x", tmp_path, local), CheckpointFolder)
    assert open_checkpoints(tmp_path / "x", tmp_path, local).directory == tmp_path / "x"
    assert isinstance(open_checkpoints("s3://bucket/runs/c-1", tmp_path, s3), StoredCheckpoints)
    with pytest.raises(StoreError, match="gs://bucket"):
        open_checkpoints("gs://bucket/runs", tmp_path, local)
