"""Checkpoints in directories and stores: one commit, damage, outages and failing calls, and where they go."""

import itertools
import json
import logging
import random
import resource
import threading
import time
from pathlib import Path

import pytest

from blend.finetune.checkpoint import ADAPTER_FILE, MANIFEST_FILE, STATE_FILE, CheckpointFolder, read_state
from blend.finetune.config import TrainConfig
from blend.finetune.errors import CheckpointError, ResumeError
from infra.errors import BucketMissingError, StoreAccessError, StoreError, StoreUnreachableError
from infra.local_store import LocalStore
from infra.settings import Settings
from infra.storage import open_store
from workers import checkpoints as places
from workers.checkpoints import StoredCheckpoints, checkpoint_location, insist, open_checkpoints, pauses
from workers.training import TrainJob, fit_in_process

CLOCK = {"seconds", "rollout_seconds", "images_per_second"}


class Flaky(LocalStore):
    """A local store of which a share of the calls fails: before they were done, or after, their reply lost."""

    def __init__(self, root: Path, share: float = 0.0, seed: int = 0) -> None:
        super().__init__(root)
        self.share, self.failures, self.away = share, 0, False
        self._random = random.Random(seed)

    def _call(self, method, *arguments):
        fails = self.away or self._random.random() < self.share
        lost = not self.away and self._random.random() < 0.5
        result = None if fails and not lost else getattr(LocalStore, method)(self, *arguments)
        if fails:
            self.failures += 1
            raise StoreUnreachableError(f"{self.url}: no answer")
        return result

    def read(self, path):
        return self._call("read", path)

    def create(self, path, data):
        return self._call("create", path, data)

    def upload(self, path, source):
        return self._call("upload", path, source)

    def list(self, prefix):
        return self._call("list", prefix)

    def delete(self, path):
        return self._call("delete", path)


@pytest.fixture(scope="module")
def job(tiny_sd_dir):
    settings = {
        "name": "stored",
        "reward": "colourfulness",
        "base_model": str(tiny_sd_dir),
        "prompts": ("A red colored car.", "A blue colored cup."),
        "held_out_prompts": ("A red colored cup.",),
        "held_out_images": 2,
        "rank": 2,
        "iterations": 6,
        "prompts_per_iteration": 2,
        "images_per_prompt": 2,
        "num_inference_steps": 2,
        "train_steps_per_sample": 1,
        "num_workers": 0,
    }
    return TrainJob.prepare(TrainConfig.parse(settings))


@pytest.fixture(scope="module")
def trainer(job):
    """One whose base was evaluated; tests set its iteration and save it."""
    trainer = job.trainer()
    trainer.history.append({"iteration": 0, **trainer.evaluate()})
    return trainer


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The state at the end of the undisturbed run."""
    return read_state(fit_in_process(job, CheckpointFolder(tmp_path_factory.mktemp("whole")), lambda _: None))


@pytest.fixture
def save(trainer):
    def at(checkpoints, iteration):
        trainer.iteration = iteration
        return checkpoints.save(trainer)

    return at


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(places, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(places, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(places, "DEADLINE_S", 0.3)


def same_training(state, other):
    lines = [[{k: v for k, v in line.items() if k not in CLOCK} for line in s["history"]] for s in (state, other)]
    return lines[0] == lines[1] and all(
        one.equal(two) for one, two in zip(state["parameters"], other["parameters"], strict=True)
    )


def stored(root):
    return sorted(path.relative_to(root).as_posix().split("-")[0] for path in root.rglob("*") if path.is_file())


# ---- one commit


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


# ---- a store that is away


def test_pauses_cover_more_than_an_outage_of_a_minute():
    assert places.DEADLINE_S >= 300
    now, calls = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    def call():
        calls.append(now[0])
        if now[0] < 60:
            raise StoreUnreachableError("away")
        return "back"

    assert insist(call, clock=lambda: now[0], sleep=sleep) == "back"
    assert 60 <= now[0] <= 60 + places.LONGEST_PAUSE_S
    assert len(calls) < 30
    with pytest.raises(StoreUnreachableError):
        insist(lambda: call() if now[0] < 0 else refuse(), clock=lambda: now[0], sleep=sleep)
    assert 0.9 * places.DEADLINE_S <= now[0] - calls[-1] <= places.DEADLINE_S
    fixed = list(itertools.islice(pauses(lambda low, high: (low, high)), 8))
    assert all(low == high / 2 <= places.LONGEST_PAUSE_S for low, high in fixed)


def refuse():
    raise StoreUnreachableError("away for good")


@pytest.mark.parametrize("refusal", [StoreAccessError, BucketMissingError])
def test_refusals_are_not_repeated(refusal):
    calls = []

    def call():
        calls.append(1)
        raise refusal("wrong key")

    with pytest.raises(refusal):
        insist(call)
    assert calls == [1]


@pytest.mark.parametrize("error", [StoreUnreachableError, StoreAccessError])
def test_newest_that_cannot_be_read_now_is_not_passed_over(save, tmp_path, impatient, error):
    """Going on from the one before would train again what is there, and say that it is damaged."""

    class Refusing(LocalStore):
        def download(self, path, target):
            raise error("no download")

    for iteration in (1, 2):
        save(StoredCheckpoints(LocalStore(tmp_path / "store"), tmp_path / "cache"), iteration)
    elsewhere = StoredCheckpoints(Refusing(tmp_path / "store"), tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="iteration 2 cannot be read: no download"):
        elsewhere.latest()


def test_tenth_of_calls_failing_changes_nothing(job, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "FIRST_PAUSE_S", 0.01)
    store = Flaky(tmp_path / "store", share=0.1, seed=1)
    checkpoints = StoredCheckpoints(store, tmp_path / "cache")
    state = read_state(fit_in_process(job, checkpoints, lambda _: None))
    assert store.failures >= 3
    assert same_training(state, whole)
    elsewhere = StoredCheckpoints(LocalStore(tmp_path / "store"), tmp_path / "elsewhere")
    assert same_training(read_state(elsewhere.latest()), whole)


def test_deadline_names_the_store_and_the_local_copy_and_a_later_run_goes_on(job, whole, tmp_path, impatient):
    store = Flaky(tmp_path / "store")
    checkpoints = StoredCheckpoints(store, tmp_path / "cache")

    def go_away(metrics):
        store.away = metrics["iteration"] == 2

    with pytest.raises(CheckpointError) as raised:
        fit_in_process(job, checkpoints, go_away)
    assert str(tmp_path / "cache" / "iteration_000003") in str(raised.value)
    assert f"file://{tmp_path / 'store'}" in str(raised.value)
    store.away = False
    announced = []
    state = read_state(fit_in_process(job, checkpoints, lambda metrics: announced.append(metrics["iteration"])))
    assert announced == [4, 5, 6]
    assert same_training(state, whole)


@pytest.mark.slow
def test_outage_of_a_real_server_is_waited_out(job, whole, start_s3_server, tmp_path, monkeypatch):
    """The server is ended for seconds while a run trains; by its real pauses a run outlives minutes (see above)."""
    monkeypatch.setattr(places, "LONGEST_PAUSE_S", 0.5)
    server = start_s3_server()
    url = f"s3://{server.facts.bucket}/runs/x"
    settings = Settings(
        store_url=url,
        s3_endpoint_url=server.facts.endpoint_url,
        s3_key=server.facts.key,
        s3_secret=server.facts.secret,
    )
    checkpoints = open_checkpoints(url, tmp_path / "cache", settings)
    assert isinstance(checkpoints, StoredCheckpoints)
    announced, outages = [], []

    def watch(metrics):
        announced.append(metrics["iteration"])
        if metrics["iteration"] == 2:
            server.kill()
            outages.append(threading.Thread(target=lambda: (time.sleep(4), server.start())))
            outages[0].start()

    started = time.monotonic()
    state = read_state(fit_in_process(job, checkpoints, watch))
    outages[0].join()
    assert time.monotonic() - started >= 4
    assert announced == [0, 1, 2, 3, 4, 5, 6]
    assert same_training(state, whole)
    elsewhere = open_checkpoints(url, tmp_path / "elsewhere", settings)
    assert same_training(read_state(elsewhere.latest()), whole)
    manifests = open_store(url, settings).list("manifests")
    assert [path.split("/")[1][:6] for path in manifests] == ["000005", "000006"]


# ---- where they go


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
