"""The flow train_basis on a tiny model: record, artifacts, a retry that publishes nothing new, bad input."""

from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from blend.finetune.errors import ConfigError
from flows.progress import show_progress
from flows.train_basis import artifact_key, train_basis
from infra.errors import StoreError
from infra.manifests import AdapterRecord
from infra.registry import Registry
from infra.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect")]

RUN = {
    "name": "colour_1",
    "reward": "colourfulness",
    "prompts": ["A red colored car.", "A blue colored cup."],
    "held_out_prompts": ["A green colored car."],
    "held_out_images": 2,
    "rank": 2,
    "iterations": 2,
    "prompts_per_iteration": 1,
    "images_per_prompt": 2,
    "num_inference_steps": 2,
    "train_steps_per_sample": 1,
    "num_workers": 0,
}


def artifacts(kind: str, name: str = "colour_1"):
    key = artifact_key(name, kind)
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_flow_publishes_once_and_leaves_artifacts(tiny_sd_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    url, run = f"file://{tmp_path / 'store'}", {**RUN, "base_model": str(tiny_sd_dir)}
    record = AdapterRecord.model_validate(train_basis(run, store_url=url))
    assert record.ref == "colour_1@1"
    assert record.kl_weight == 0.01
    assert UUID(record.run_ids["prefect"])
    assert [artifact.data for artifact in artifacts("progress")] == [100.0]
    [table] = artifacts("metrics")
    assert '"iteration": 2' in str(table.data)
    [report] = artifacts("report")
    assert "data:image/png;base64," in str(report.data)
    assert "colour_1@1" in str(report.data)
    [link] = artifacts("adapter")
    assert f"{url}/adapters/colour_1/versions/000001.json" in str(link.data)
    assert (tmp_path / "store/adapters/colour_1/versions/000001.json").is_file()

    again = train_basis(run, store_url=url)
    assert (again["version"], again["digest"]) == (1, record.digest)
    assert len(Registry(open_store(url)).versions("colour_1", "adapter")) == 1


def test_progress_that_prefect_does_not_take_is_logged_and_costs_nothing_else(monkeypatch, caplog):
    def refuse(_artifact: object, progress: float) -> None:
        raise ConnectionError("no answer")

    @flow
    def shows() -> str:
        show_progress(UUID(int=0), 40.0)
        return "went on"

    monkeypatch.setattr("flows.progress.update_progress_artifact", refuse)
    assert shows() == "went on"
    assert "progress of 40 % was not shown: ConnectionError: no answer" in caplog.text


def test_an_interrupted_flow_says_how_to_go_on_and_does(tiny_sd_dir: Path, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("DIFFUSION_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    run = {**RUN, "name": "colour_2", "base_model": str(tiny_sd_dir)}
    places = {"store_url": f"file://{tmp_path / 'store'}", "checkpoints": str(tmp_path / "checkpoints")}

    def interrupt(_artifact: object, progress: float) -> None:
        if progress == 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flows.progress.update_progress_artifact", interrupt)
        with pytest.raises(BaseException) as stopped:  # noqa: PT011 - Prefect may wrap it
            train_basis(run, **places)
    assert not isinstance(stopped.value, AssertionError)
    assert "colour_2 was interrupted: run the flow again with the same parameters to resume" in caplog.text
    assert list((tmp_path / "checkpoints").iterdir())
    assert train_basis(run, **places)["version"] == 1


def test_flow_refuses_bad_input_before_training(tiny_sd_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLEND_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="learning_rate is -1"):
        train_basis({**RUN, "base_model": str(tiny_sd_dir), "learning_rate": -1}, store_url=f"file://{tmp_path}")
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(StoreError):
        train_basis({**RUN, "base_model": str(tiny_sd_dir)}, store_url=f"file://{tmp_path / 'file'}")
    assert not (tmp_path / "cache").exists()
