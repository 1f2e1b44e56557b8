"""Fixtures of the storage room: every test of a store runs on a directory and on a real S3 server."""

import importlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from safetensors.numpy import save_file

from infra.manifests import WEIGHTS_FILE, AdapterFacts, AdapterRecord, BaseIdentity
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import Store, open_store

BENCH = Path(__file__).parents[1] / "bench"
BASE = BaseIdentity(source="sprites", sha256="ab" * 32)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings whose store is empty, and the test's own."""
    if request.param == "local":
        return Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")
    server = request.getfixturevalue("s3_server")
    return Settings(
        store_url=f"s3://{server.bucket}/{secrets.token_hex(8)}",
        s3_endpoint_url=server.endpoint_url,
        s3_key=server.key,
        s3_secret=server.secret,
        cache_dir=tmp_path / "cache",
    )


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings=settings)


@pytest.fixture
def registry(store: Store) -> Registry:
    return Registry(store)


@pytest.fixture
def facts() -> AdapterFacts:
    return AdapterFacts(
        base=BASE,
        rank=2,
        alpha=2.0,
        target_modules=("to_q", "to_v"),
        reward="colourfulness",
        reward_version="1",
        kl_weight=0.1,
        seed=0,
    )


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Callable[..., Path]:
    """Factory (seed) -> directory with LoRA weights that differ from seed to seed."""

    def make(seed: int = 0) -> Path:
        directory = tmp_path / f"adapter-{seed}"
        directory.mkdir(exist_ok=True)
        noise = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
        save_file({"unet.block.to_q.lora_A.weight": noise}, directory / WEIGHTS_FILE)
        return directory

    return make


@pytest.fixture
def publish(adapter_dir: Callable[..., Path], facts: AdapterFacts) -> Callable[..., AdapterRecord]:
    """Factory (registry, seed) -> the next version of the adapter `colour`, of other content for each seed."""

    def make(registry: Registry, seed: int = 0) -> AdapterRecord:
        return registry.publish_adapter("colour", adapter_dir(seed), facts.model_copy(update={"seed": seed}))

    return make


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Factory (name) -> that module of tests/bench/registry_parts, which the benchmark runs at full length."""
    monkeypatch.syspath_prepend(BENCH)
    return lambda name: importlib.import_module(f"registry_parts.{name}")


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Publishers in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        module = importlib.import_module("registry_parts.crew")
    with module.Crew(tmp_path_factory.mktemp("crew")) as crew:
        yield crew


@pytest.fixture
def proxy(settings: Settings) -> Iterator[FaultProxy]:
    """A proxy before the S3 server of a test that takes no local store; without faults until told."""
    assert settings.s3_endpoint_url is not None
    with FaultProxy(settings.s3_endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def faulty(settings: Settings, proxy: FaultProxy) -> Registry:
    """The test's registry as seen through the proxy."""
    return Registry(open_store(settings=settings.model_copy(update={"s3_endpoint_url": proxy.url})))
