"""From a reference to an engine: the user's store, the package's own, the cache, and the base model's identity."""

import pickle
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import blend.sprites
import infra.s3_client
from blend.adapters import AdapterError
from blend.engine import BlendEngine, Sample
from blend.model import model_hash
from blend.preference import Preference
from infra.errors import IntegrityError, StoreUnreachableError, UnknownRecordError
from infra.manifests import WEIGHTS_FILE, BaseIdentity
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store
from workers.bundles import BundleError, LoadedBundle, load_engine, open_bundle, resolve_base, verify_base

BUNDLE = "tiny@champion"


@pytest.fixture
def settings(tiny_store_url: str, tmp_path: Path) -> Settings:
    return Settings(store_url=tiny_store_url, cache_dir=tmp_path / "cache")


@pytest.fixture
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blend.sprites, "REGISTRY_PATH", tmp_path / "no-registry", raising=False)


def images(engine: BlendEngine, weights: dict[str, float], kl_lambda: float = 1.0) -> torch.Tensor:
    preference = Preference(weights=weights, kl_lambda=kl_lambda)
    outputs = engine.run([Sample(prompt="a cup", preference=preference, seed=3, num_inference_steps=2)])
    assert outputs[0].error is None
    return outputs[0].latents


def test_a_bundle_becomes_files_and_an_engine(settings: Settings, tiny_sd_dir: Path, tiny_adapters: dict[str, str]):
    bundle = open_bundle(BUNDLE, settings)
    assert isinstance(bundle, LoadedBundle)
    assert (bundle.ref, bundle.base_path) == ("tiny@1", tiny_sd_dir)
    assert sorted(bundle.adapters) == sorted(tiny_adapters)
    for basis, directory in bundle.adapters.items():
        assert directory.is_relative_to(settings.cache_dir)
        assert (directory / WEIGHTS_FILE).read_bytes() == (Path(tiny_adapters[basis]) / WEIGHTS_FILE).read_bytes()
    engine = load_engine(bundle, max_rows=8)
    assert sorted(engine.bank.names) == sorted(tiny_adapters)
    one, other = tiny_adapters
    assert not torch.equal(images(engine, {one: 1.0}), images(engine, {other: 1.0}))
    assert torch.equal(images(engine, {one: 1.0}, kl_lambda=0.0), images(engine, {other: 1.0}, kl_lambda=0.0))


@pytest.mark.slow
def test_a_bundle_in_s3_is_the_same_as_on_disk(s3_server, tiny_store_url: str, tmp_path: Path):
    local = Registry(open_store(tiny_store_url))
    settings = Settings(
        store_url=f"s3://{s3_server.bucket}/{tmp_path.name}",
        s3_endpoint_url=s3_server.endpoint_url,
        s3_key=s3_server.key,
        s3_secret=s3_server.secret,
        cache_dir=tmp_path / "cache",
    )
    remote = open_store(settings=settings)
    for path in local.store.list(""):
        remote.create(path, local.store.read(path))
    bundle = open_bundle(BUNDLE, settings)
    assert bundle.record == local.get(BUNDLE)
    assert {basis: (path / WEIGHTS_FILE).read_bytes() for basis, path in bundle.adapters.items()} == {
        basis: (path / WEIGHTS_FILE).read_bytes()
        for basis, path in open_bundle(BUNDLE, Settings(store_url=tiny_store_url)).adapters.items()
    }


@pytest.mark.slow
def test_a_warm_load_from_s3_asks_for_the_alias_alone_and_none_for_nothing(
    s3_server, tiny_store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(
        store_url=f"s3://{s3_server.bucket}/{tmp_path.name}",
        s3_endpoint_url=s3_server.endpoint_url,
        s3_key=s3_server.key,
        s3_secret=s3_server.secret,
        cache_dir=tmp_path / "cache",
    )
    local, remote = open_store(tiny_store_url), open_store(settings=settings)
    for path in local.list(""):
        remote.create(path, local.read(path))
    asked: list[str] = []
    # stores of the same settings share one connection pool
    events = remote._client.fs.s3.meta.events
    events.register("before-send.s3", lambda request, **_: asked.append(urlsplit(request.url).path), "count")
    try:
        cold, cold_requests = open_bundle(BUNDLE, settings), len(asked)
        asked.clear()
        warm = open_bundle(BUNDLE, settings)
    finally:
        events.unregister("before-send.s3", unique_id="count")
    assert warm == cold
    assert [path.rsplit("/", 2)[1:] for path in asked] == [["aliases", "champion.json"]]
    assert cold_requests > 1
    monkeypatch.setattr(infra.s3_client, "FIRST_PAUSE_S", 0.01)
    assert open_bundle(BUNDLE, settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})) == cold


def test_bundles_of_the_package_are_found_unless_the_users_store_has_the_name(
    tiny_store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shipped = Path(tiny_store_url.removeprefix("file://"))
    monkeypatch.setattr(blend.sprites, "REGISTRY_PATH", shipped, raising=False)
    before = sorted(path for path in shipped.rglob("*"))
    settings = Settings(store_url=f"file://{tmp_path}/own", cache_dir=tmp_path / "cache")
    record = open_bundle(BUNDLE, settings).record
    assert sorted(path for path in shipped.rglob("*")) == before
    assert not (tmp_path / "own").exists()
    with pytest.raises(UnknownRecordError, match=r"there are: none yet.*Among those of the package: .*are 1 to 1"):
        open_bundle("tiny@7", settings)

    theirs, own = Registry(open_store(tiny_store_url)), Registry(open_store(settings.store_url))
    adapters = theirs.adapters_of(record)
    name, adapter = next(iter(adapters.items()))
    directory = theirs.fetch(adapter, tmp_path / "copy")
    mine = own.publish_adapter("mine", directory, adapter.model_copy(update={"seed": 7}))
    own.publish_bundle("tiny", record.base, {name: mine})
    assert list(open_bundle("tiny", settings).adapters) == [name]
    with pytest.raises(UnknownRecordError, match=r"no alias 'champion'.*it has: none"):
        open_bundle(BUNDLE, settings)


@pytest.mark.usefixtures("nothing_shipped")
def test_an_unknown_bundle_is_named(settings: Settings):
    with pytest.raises(UnknownRecordError, match=r"no bundle 'tinny'.*there are: tiny"):
        open_bundle("tinny@champion", settings)


@pytest.mark.slow
def test_an_unreachable_store_is_not_passed_over(tmp_path: Path):
    settings = Settings(
        store_url="s3://bucket/prefix",
        s3_endpoint_url="http://127.0.0.1:9",
        s3_key="key",
        s3_secret="secret",
        cache_dir=tmp_path / "cache",
    )
    with pytest.raises(StoreUnreachableError, match=r"127\.0\.0\.1:9"):
        open_bundle("sprites@champion", settings)


def test_a_bundle_is_refused_on_another_base(settings: Settings, tiny_sd_dir: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(tiny_sd_dir, other)
    assert open_bundle(BUNDLE, settings, base=str(other)).base_path == other
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"has hash \w{12}, bundle tiny@1 was made with \w{12}") as caught:
        open_bundle(BUNDLE, settings.model_copy(update={"cache_dir": tmp_path / "unused"}), base=str(other))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not (tmp_path / "unused").exists()


def test_verify_base_compares_the_hash(settings: Settings, tiny_sd_dir: Path):
    record = open_bundle(BUNDLE, settings).record
    assert record.base.sha256 == model_hash(tiny_sd_dir)
    assert verify_base(record) == tiny_sd_dir
    foreign = record.model_copy(update={"base": BaseIdentity(source=str(tiny_sd_dir), sha256="0" * 64)})
    with pytest.raises(BundleError, match="made with 000000000000"):
        verify_base(foreign)


def test_tampered_weights_do_not_reach_an_engine(tiny_store_url: str, tmp_path: Path):
    copy = tmp_path / "store"
    shutil.copytree(tiny_store_url.removeprefix("file://"), copy)
    settings = Settings(store_url=f"file://{copy}", cache_dir=tmp_path / "cache")
    registry = Registry(open_store(settings=settings))
    adapter = next(iter(registry.adapters_of(registry.get(BUNDLE)).values()))
    weights = next(file for file in adapter.files if file.path == WEIGHTS_FILE)
    blob = copy / "blobs" / "sha256" / weights.sha256
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{WEIGHTS_FILE} of adapter {adapter.ref} is damaged"):
        open_bundle(BUNDLE, settings)


def test_an_adapter_of_another_shape_does_not_load(settings: Settings, tiny_sd_dir: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    bundle = open_bundle(BUNDLE, settings)
    name, directory = next(iter(bundle.adapters.items()))
    tensors = {key: torch.cat([tensor, tensor], dim=-1) for key, tensor in load_file(directory / WEIGHTS_FILE).items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterError):
        load_engine(LoadedBundle(bundle.record, tiny_sd_dir, {name: tmp_path}))


def test_a_base_is_a_directory_a_name_or_a_hub_id(tiny_sd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve_base(tiny_sd_dir) == str(tiny_sd_dir)
    monkeypatch.chdir(tiny_sd_dir.parent)
    assert resolve_base(tiny_sd_dir.name) == str(tiny_sd_dir)
    monkeypatch.setattr(blend.sprites, "base_model_path", lambda: tiny_sd_dir, raising=False)
    assert resolve_base("sprites") == str(tiny_sd_dir)
    with pytest.raises(BundleError, match=r"no model_index\.json"):
        resolve_base(tmp_path)
    for name in ("/no/such/directory", "no-such-name", "three/part/name", ""):
        with pytest.raises(BundleError, match="does not exist: name a diffusers directory, a Hub id"):
            resolve_base(name)
    with pytest.raises(BundleError, match=r"'nobody/nothing' cannot be downloaded: .*Check the id and the network"):
        resolve_base("nobody/nothing")
