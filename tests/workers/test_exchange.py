"""Adapters out of the registry as kohya's single files, and adapters trained elsewhere into it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, safe_open, save_file

from blend.adapters import AdapterBank
from blend.lora_file import read_lora
from blend.model import load_model
from infra.errors import RegistryError, UnsafeFileError
from infra.manifests import WEIGHTS_FILE
from infra.registry import Registry
from infra.storage import open_store
from workers.exporting import export_kohya
from workers.importing import import_adapter


@pytest.fixture
def tiny(tiny_store_url: str) -> Registry:
    return Registry(open_store(tiny_store_url))


def image(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("A cat.", num_inference_steps=2, output_type="np", generator=generator).images[0])


def test_kohyas_single_files_draw_what_the_diffusers_directory_draws(tiny: Registry, tiny_sd_dir: Path, tmp_path: Path):
    bundle = tiny.get_bundle("tiny@champion")
    directory = export_kohya(tiny, bundle, tmp_path / "kohya")
    names = {f"{basis}.safetensors" for basis in bundle.adapters} | {"README.md", "manifest.json"}
    assert {path.name for path in directory.iterdir()} == names
    note = (directory / "README.md").read_text()
    assert "Stacking them only approximates the blend" in note
    for basis, adapter in tiny.adapters_of(bundle).items():
        file = directory / f"{basis}.safetensors"
        with safe_open(file, framework="pt") as opened:
            assert all(key.startswith("lora_unet_") for key in opened.keys())  # noqa: SIM118
            assert "only approximates" in opened.metadata()["modelspec.description"]
        drawn = []
        for path in (tiny.fetch(adapter, tmp_path / basis), file):
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
            pipeline.set_progress_bar_config(disable=True)
            plain = image(pipeline)
            pipeline.load_lora_weights(path)
            drawn.append(image(pipeline))
        assert torch.allclose(*drawn, atol=1e-5)
        assert not torch.allclose(plain, drawn[0], atol=1e-3)


def test_an_exported_directory_must_be_new(tiny: Registry, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RegistryError, match="not an empty directory"):
        export_kohya(tiny, tiny.get_bundle("tiny"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_imported_lora_is_the_same_adapter(tiny: Registry, tiny_sd_dir: Path, tmp_path: Path, layout: str):
    known = tiny.get_adapter("warm")
    source = tiny.fetch(known, tmp_path / "warm")
    if layout == "kohya":
        source = export_kohya(tiny, known, tmp_path / "kohya") / "warm.safetensors"
    own = Registry(open_store(str(tmp_path / "store")))
    record = import_adapter(own, "found", source, base=str(tiny_sd_dir), reward="warmth", licence="MIT")
    assert (record.rank, record.alpha, record.kl_weight, record.seed) == (known.rank, known.alpha, None, None)
    assert (record.reward, record.reward_version, record.licence) == ("warmth", "not known", "MIT")
    assert record.target_modules == ("to_k", "to_out.0", "to_q", "to_v")
    assert record.base == known.base
    bank = AdapterBank(load_model(tiny_sd_dir).unet, base_hash=record.base.sha256)
    bank.load("found", own.fetch(record, tmp_path / "fetched"))
    theirs, ours = read_lora(source), read_lora(tmp_path / "fetched")
    assert theirs.layers.keys() == ours.layers.keys()
    for name, layer in theirs.layers.items():
        mine = ours.layers[name]
        assert torch.allclose(layer.scale * layer.up @ layer.down, mine.scale * mine.up @ mine.down)
    assert import_adapter(own, "found", source, base=str(tiny_sd_dir), reward="warmth", licence="MIT") == record
    assert "not known" in (tmp_path / "fetched" / "README.md").read_text()


def test_what_does_not_fit_is_not_imported(tiny_lora: Callable[..., Path], tiny_sd_dir: Path, tmp_path: Path):
    own = Registry(open_store(str(tmp_path / "store")))
    directory = tiny_lora(tmp_path / "lora")
    tensors = load_file(directory / WEIGHTS_FILE)
    save_file({key.replace("attn1", "attn7"): one for key, one in tensors.items()}, directory / WEIGHTS_FILE)
    with pytest.raises(RegistryError, match=r"cannot be an adapter of .*attn7"):
        import_adapter(own, "found", directory, base=str(tiny_sd_dir))
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04evil")
    with pytest.raises(UnsafeFileError, match="pickle"):
        import_adapter(own, "found", tmp_path / "evil.safetensors", base=str(tiny_sd_dir))
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        import_adapter(own, "found", tmp_path / "none", base=str(tiny_sd_dir))
    assert own.names("adapter") == []
