"""One process and the bundle it serves: changed under requests, refused when wrong, followed by alias."""

import asyncio
import shutil

import pytest

from infra.errors import UnknownRecordError
from infra.manifests import BundleDefaults
from infra.registry import Registry
from infra.storage import open_store
from workers.api import GenerationRequest, Health, Refusal
from workers.bundle_host import BundleHost
from workers.engine_args import ServeArgs
from workers.metrics import Metrics

REQUEST = GenerationRequest(prompt="a red car", weights={"warm": 1.0}, num_inference_steps=3, seed=1)


class Served(Metrics):
    def __init__(self) -> None:
        self.versions: list[int | None] = []

    def serving(self, *, name: str, version: int | None, digest: str) -> None:
        self.versions.append(version)


@pytest.fixture
def registry(tiny_store_url, tmp_path):
    """tiny@1 is the champion; tiny@2 has other defaults."""
    shutil.copytree(tiny_store_url.removeprefix("file://"), tmp_path / "store")
    registry = Registry(open_store(f"file://{tmp_path / 'store'}"))
    first = registry.get_bundle("tiny@1")
    adapters = {name: registry.get_adapter(name) for name in first.adapters}
    defaults = BundleDefaults(guidance_scale=3.0, num_inference_steps=5)
    registry.publish_bundle("tiny", first.base, adapters, defaults=defaults)
    return registry


@pytest.fixture
def host(registry):
    host = BundleHost(ServeArgs(store_url=registry.store.url, follow_alias_s=0.05), Served())
    host.start("tiny@champion")
    yield host
    host.service.close()


def version(host: BundleHost) -> int | None:
    return host.service.opened.card.bundle.version


def test_requests_end_on_the_bundle_they_began_on(host):
    long = REQUEST.model_copy(update={"num_inference_steps": 150})

    async def run() -> tuple[int | None, int | None]:
        old = host.service
        pending = asyncio.create_task(old.generate(long))
        await asyncio.sleep(0.05)
        host.want("tiny@2")
        await host.settled()
        assert old.loop.alive, "it has a request to end"
        newer = await host.service.generate(REQUEST)
        older = await pending
        await asyncio.gather(*host._retiring)
        assert not old.loop.alive
        return older.bundle.version, newer.bundle.version

    assert asyncio.run(run()) == (1, 2)
    assert host._metrics.versions == [1, 2]


def test_the_same_bundle_again_changes_nothing(host):
    async def run() -> None:
        before = host.service
        for _ in range(3):
            host.want("tiny@champion")
            await host.settled()
        assert host.service is before

    asyncio.run(run())


@pytest.mark.parametrize("bundle", ["tiny@9", "nothing", "tiny@later"])
def test_a_wrong_bundle_leaves_the_old_one_with_a_warning(host, bundle):
    async def run() -> None:
        host.want(bundle)
        await host.settled()
        ready = await host.readiness()
        assert isinstance(ready, Health)
        assert ready.bundle.version == 1
        assert f"{bundle} could not be loaded" in ready.warning
        assert isinstance(host.standing(bundle, "tiny@9"), Refusal)
        assert (await host.service.generate(REQUEST)).bundle.version == 1
        host.want("tiny@2")
        await host.settled()
        assert (await host.readiness()).warning is None

    asyncio.run(run())
    assert version(host) == 2


def test_the_last_of_several_wishes_is_fulfilled(host):
    async def run() -> None:
        for bundle in ("tiny@2", "nothing", "tiny@1", "tiny@2"):
            host.want(bundle)
        await host.settled()
        assert (await host.readiness()).warning is None

    asyncio.run(run())
    assert version(host) == 2


def test_an_alias_that_moves_is_followed(host, registry):
    async def run() -> None:
        following = asyncio.create_task(host.follow())
        registry.promote("tiny", 2, actor="tests", reason="better")
        async with asyncio.timeout(60):
            while version(host) != 2:
                await asyncio.sleep(0.02)
        following.cancel()

    asyncio.run(run())
    assert host.service.opened.card.accepted_names == ["tiny", "tiny@2", "tiny@champion"]


def test_a_bundle_is_checked_before_it_is_wanted(host):
    assert host.resolve("tiny@champion") == "tiny@1"
    assert host.resolve("nothing").status == 404
    with pytest.raises(UnknownRecordError):
        BundleHost(ServeArgs(store_url=host._args.store_url)).start("nothing")


def test_a_base_with_adapters_by_path_stays(tiny_sd_dir, tiny_adapters):
    host = BundleHost(ServeArgs(base=str(tiny_sd_dir), adapters=tiny_adapters))
    host.start(None)
    assert host.resolve("tiny@1").status == 409
    assert version(host) is None

    async def again() -> None:
        host.want(None)
        await host.settled()
        assert (await host.readiness()).warning is None

    asyncio.run(again())
    host.service.close()
