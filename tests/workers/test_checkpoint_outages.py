"""Checkpoints in a store that is away, or loses calls: what is waited out, and what is left after."""

import itertools
import random
import threading
import time
from pathlib import Path

import pytest

from blend.finetune.checkpoint import CheckpointFolder, read_state
from blend.finetune.errors import CheckpointError
from infra.errors import BucketMissingError, StoreAccessError, StoreUnreachableError
from infra.local_store import LocalStore
from infra.settings import Settings
from infra.storage import open_store
from workers import checkpoints as places
from workers.checkpoints import StoredCheckpoints, insist, open_checkpoints, pauses
from workers.training import fit_in_process

CLOCK = {"seconds", "rollout_seconds", "images_per_second"}

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
def whole(job, tmp_path_factory):
    """The state at the end of the undisturbed run."""
    return read_state(fit_in_process(job, CheckpointFolder(tmp_path_factory.mktemp("whole")), lambda _: None))


def same_training(state, other):
    lines = [[{k: v for k, v in line.items() if k not in CLOCK} for line in s["history"]] for s in (state, other)]
    return lines[0] == lines[1] and all(
        one.equal(two) for one, two in zip(state["parameters"], other["parameters"], strict=True)
    )


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
            outages.append(threading.Thread(target=lambda: (time.sleep(2), server.start())))
            outages[0].start()

    started = time.monotonic()
    state = read_state(fit_in_process(job, checkpoints, watch))
    outages[0].join()
    assert time.monotonic() - started >= 2
    assert announced == [0, 1, 2, 3, 4, 5, 6]
    assert same_training(state, whole)
    elsewhere = open_checkpoints(url, tmp_path / "elsewhere", settings)
    assert same_training(read_state(elsewhere.latest()), whole)
    manifests = open_store(url, settings).list("manifests")
    assert [path.split("/")[1][:6] for path in manifests] == ["000005", "000006"]
