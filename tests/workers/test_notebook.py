"""The notebook face over what the registry exports and what `open_bundle` returns."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from blend import DiffusionBlendPipeline, ManifestError, ModelError
from infra.export import MANIFEST_FILE, export
from infra.manifests import Record
from infra.settings import Settings
from workers.bundles import LoadedBundle, find_record, open_bundle

WEIGHTS = {"warm": 0.5, "small": 0.5}


@pytest.fixture(scope="module")
def opened(tiny_store_url: str) -> LoadedBundle:
    return open_bundle("tiny@champion", Settings(store_url=tiny_store_url))


@pytest.fixture
def exported(opened: LoadedBundle, tiny_store_url: str, tmp_path: Path) -> Path:
    registry, record = find_record(opened.ref, Settings(store_url=tiny_store_url))
    return export(registry, record, tmp_path / "exported")


def latents(pipeline: DiffusionBlendPipeline, **options) -> torch.Tensor:
    return pipeline("a cat", WEIGHTS, seed=3, output_type="latent", **options).images


def edit(directory: Path, **changes: object) -> None:
    file = directory / MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_bundle_blends_alike_from_a_directory_an_open_bundle_and_its_parts(exported: Path, opened: LoadedBundle):
    found = latents(DiffusionBlendPipeline.from_bundle(opened))
    assert torch.equal(found, latents(DiffusionBlendPipeline.from_bundle(exported)))
    parts = DiffusionBlendPipeline.from_pretrained(
        opened.base_path, {name: exported / name for name in opened.adapters}
    )
    advised = opened.record.defaults
    assert (advised.num_inference_steps, advised.guidance_scale) == (4, 2.0)
    assert torch.equal(found, latents(parts, num_inference_steps=4, guidance_scale=2.0))


def test_what_the_bundle_recommends_is_used_when_the_call_says_nothing(exported: Path):
    advised = {"num_inference_steps": 2, "guidance_scale": 3.0, "method": "soup", "height": 40, "width": None}
    edit(exported, defaults={**advised, "from_a_later_version": 1})
    pipeline = DiffusionBlendPipeline.from_bundle(str(exported))
    assert pipeline.defaults.model_dump() == advised
    found = latents(pipeline)
    assert found.shape[-2:] == (10, 8)
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "method": "soup", "height": 40}
    assert torch.equal(found, latents(pipeline, **asked))
    assert latents(pipeline, height=32).shape[-2:] == (8, 8)
    assert not torch.equal(found, latents(pipeline, method="mpa"))


def test_the_base_may_lie_elsewhere_but_must_be_the_same(exported: Path, opened: LoadedBundle, tmp_path: Path):
    moved, broken = tmp_path / "moved", tmp_path / "broken"
    for copy in (moved, broken):
        shutil.copytree(opened.base_path, copy)
    config = broken / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    own = json.loads((exported / MANIFEST_FILE).read_text())["base"]
    edit(exported, base={**own, "source": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match=r"nowhere' does not exist.*base= says where"):
        DiffusionBlendPipeline.from_bundle(exported)
    for bundle in (exported, opened):
        assert DiffusionBlendPipeline.from_bundle(bundle, base=moved).basis == tuple(sorted(WEIGHTS))
        with pytest.raises(ModelError, match=r"has hash \w{12}, .*bundle.* was made with \w{12}: name the base"):
            DiffusionBlendPipeline.from_bundle(bundle, base=broken)


def test_any_object_with_a_base_and_adapters_will_do(opened: LoadedBundle):
    @dataclass
    class Mine:
        base_path: str
        adapters: dict[str, str]

    mine = Mine(str(opened.base_path), {"warm": str(opened.adapters["warm"])})
    pipeline = DiffusionBlendPipeline.from_bundle(mine)
    assert pipeline.basis == ("warm",)
    assert pipeline.defaults.num_inference_steps == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this software reads up to 1: upgrade"),
        ({"adapters": {}}, "adapters: .*Export the bundle again"),
        ({"adapters": {"other": {}}}, "lacks adapter 'other' of bundle tiny@1"),
        ({"base": {"source": "sprites"}}, r"base\.sha256: Field required"),
        ({"defaults": {"num_inference_steps": "many"}}, r"defaults\.num_inference_steps"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_an_error(exported: Path, changes: dict[str, object], message: str):
    edit(exported, **changes)
    with pytest.raises(ManifestError, match=message):
        DiffusionBlendPipeline.from_bundle(exported)


def test_what_is_no_exported_bundle_is_refused(
    exported: Path, opened: LoadedBundle, tiny_store_url: str, tmp_path: Path
):
    with pytest.raises(ManifestError, match=r"'sprites@champion' is no exported bundle.*registry export.*open_bundle"):
        DiffusionBlendPipeline.from_bundle("sprites@champion")
    (exported / MANIFEST_FILE).write_text("{")
    with pytest.raises(ManifestError, match=r"manifest.json is no manifest"):
        DiffusionBlendPipeline.from_bundle(exported)
    registry, _ = find_record(opened.ref, Settings(store_url=tiny_store_url))
    adapter: Record = next(iter(registry.adapters_of(opened.record).values()))
    with pytest.raises(ManifestError, match=r"holds an adapter, not a bundle: use from_pretrained"):
        DiffusionBlendPipeline.from_bundle(export(registry, adapter, tmp_path / "one"))


def test_the_shipped_base_goes_by_its_name():
    pipeline = DiffusionBlendPipeline.from_pretrained("sprites")
    image = pipeline("A red colored car.", seed=1, num_inference_steps=2, guidance_scale=3.0).images[0]
    assert image.size == (64, 64)
