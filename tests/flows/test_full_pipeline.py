"""The full pipeline on a tiny model: run twice, it trains, registers and evaluates once."""

from pathlib import Path

import httpx
import pytest
from PIL import Image

from workers.bundles import BundleError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("coarse_figures")]

REWARDS = ("colourfulness", "compressibility")
SETTINGS = {
    "rewards": REWARDS,
    "prompts": ("A red car.", "A blue cup."),
    "held_out_prompts": ("A green cup.", "A red dog."),
    "bundle": "twice",
    "training": {
        "iterations": 1,
        "prompts_per_iteration": 1,
        "images_per_prompt": 2,
        "num_inference_steps": 2,
        "train_steps_per_sample": 1,
        "held_out_images": 2,
        "num_workers": 0,
    },
    "evaluation": {
        "seeds": 1,
        "num_inference_steps": 2,
        "methods": ("mpa",),
        "pair_weights": (0.5,),
        "num_workers": 0,
        "resamples": 100,
        "picture_prompts": 1,
    },
}


def written(directory: Path) -> dict[str, int]:
    """When each file below a directory was last written, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_second_run_trains_and_registers_nothing(prefect, serving, tiny_sd_dir, tmp_path, monkeypatch):
    from flows.full_pipeline import full_pipeline
    from flows.local_services import free_port
    from workers.deploying import undeploy

    monkeypatch.setenv("DIFFUSION_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    out, store = tmp_path / "out", tmp_path / "store"
    settings = SETTINGS | {"base_model": str(tiny_sd_dir), "store_url": f"file://{store}", "output_dir": str(out)}
    first = full_pipeline(**settings, port=free_port())
    stored = written(store)
    trained = {name: written(out / name / "checkpoints") for name in REWARDS}
    [card] = httpx.get(f"{first['url']}/v1/models").json()["data"]
    second = full_pipeline(**settings, port=free_port())
    undeploy()

    assert first["bundle"] == "twice@1"
    assert [adapter["name"] for adapter in first["adapters"]] == list(REWARDS)
    assert {basis["name"] for basis in card["basis"]} == set(REWARDS)
    assert Image.open(first["image"]).text["prompt"] == "A red colored car."
    assert all(trained.values())
    assert {name: written(out / name / "checkpoints") for name in REWARDS} == trained
    assert written(store) == stored
    assert [second[key] for key in ("bundle", "adapters", "evaluation")] == [
        first[key] for key in ("bundle", "adapters", "evaluation")
    ]


def test_a_base_model_that_is_not_there_is_found_before_ray_is_asked_for(prefect, tmp_path, monkeypatch):
    from flows import full_pipeline

    monkeypatch.setattr(full_pipeline, "ray_session", lambda: pytest.fail("Ray was asked for"))
    missing = SETTINGS | {"base_model": str(tmp_path / "no-such-model"), "store_url": f"file://{tmp_path / 'store'}"}
    with pytest.raises(BundleError, match="no-such-model"):
        full_pipeline.full_pipeline(**missing)
