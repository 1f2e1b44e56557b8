"""One Prefect server and one Ray cluster for all flows that tests run in this process, and a registry."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.cli import main
from infra.registry import Registry
from infra.storage import open_store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="session")
def cluster(tiny_store_url: str) -> Iterator[str]:
    """A Ray cluster of two CPUs, as flows find one that lasts; its processes keep the cache's place of that store."""
    from workers.cluster import ray_session

    with ray_session(num_cpus=2) as address:
        yield address


@pytest.fixture
def serving(cluster: str) -> Iterator[None]:
    """The cluster, without a trace of Ray Serve after the test."""
    from ray import serve

    yield
    serve.shutdown()


@pytest.fixture
def store_url(tiny_store_url: str, tmp_path: Path) -> str:
    """The tests' own copy of a registry with the bundle tiny, version 1, and a second version of it."""
    shutil.copytree(tiny_store_url.removeprefix("file://"), tmp_path / "store")
    url = f"file://{tmp_path / 'store'}"
    registry = Registry(open_store(url))
    first = registry.get("tiny@1")
    name, adapter = next(iter(registry.adapters_of(first).items()))
    registry.publish_bundle("tiny", first.base, {name: adapter})
    return url


@pytest.fixture
def run(store_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Factory (words) -> exit code, output, errors."""
    monkeypatch.setenv("DIFFUSION_BLEND_STORE_URL", store_url)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["registry", *words])
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call
