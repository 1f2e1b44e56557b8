"""fit_basis in process and on Ray: files, resume, progress, bad input, and one gradient for any number of workers."""

import json
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from blend.finetune.checkpoint import ADAPTER_FILE, CheckpointFolder, read_state
from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError, NonFiniteError, ResumeError, StoppedError
from infra.manifests import AdapterRecord
from infra.registry import Registry
from infra.storage import open_store
from workers.publishing import UNKNOWN_LICENCE, manifest_url, publish_fit
from workers.training import TrainJob, fit_basis, fit_in_process
from workers.training_log import TENSORBOARD, read_metrics
from workers.training_sheet import LABEL_WIDTH

SETTINGS = {
    "name": "colour",
    "reward": "colourfulness",
    "prompts": ("A red colored car.", "A blue colored cup.", "A green colored bird."),
    "held_out_prompts": ("A red colored cup.", "A green colored car."),
    "held_out_images": 4,
    "rank": 2,
    "iterations": 2,
    "prompts_per_iteration": 2,
    "images_per_prompt": 2,
    "num_inference_steps": 3,
    "train_steps_per_sample": 2,
    "learning_rate": 1e-2,
    "num_workers": 0,
}


@pytest.fixture(scope="session")
def settings(tiny_sd_dir: Path):
    return {**SETTINGS, "base_model": str(tiny_sd_dir)}


@pytest.fixture(scope="session")
def fitted(settings, tmp_path_factory):
    """One in-process run: (config, output directory, result, announced metrics)."""
    config = TrainConfig.parse(settings)
    directory, seen = tmp_path_factory.mktemp("fit"), []
    return config, directory, fit_basis(config, output_dir=directory, on_progress=seen.append), seen


def weights(directory: Path):
    return load_file(directory / ADAPTER_FILE)


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def test_result_directory_is_complete(fitted):
    config, _, result, seen = fitted
    names = {path.name for path in result.adapter_dir.iterdir()}
    assert names == {ADAPTER_FILE, "README.md", "metrics.jsonl", "curve.png", "samples.png"}
    assert any(tensor.abs().max() > 0 for key, tensor in weights(result.adapter_dir).items() if "lora_B" in key)
    lines = [json.loads(line) for line in result.metrics_jsonl.read_text().splitlines()]
    assert lines == result.metrics == seen
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert result.base_mean == lines[0]["held_out_mean"]
    assert result.tuned_mean == lines[-1]["held_out_mean"]
    assert result.path_kl > 0
    assert len(lines) == len((result.adapter_dir.parent / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (result.adapter_dir.parent / TENSORBOARD).glob("*tfevents*.sheets")]
    card = (result.adapter_dir / "README.md").read_text()
    for fact in (config.reward, "A red colored car.", "kl_weight", f"{result.tuned_mean:.4f}"):
        assert fact in card
    with safe_open(result.adapter_dir / ADAPTER_FILE, "pt") as file:
        facts = file.metadata()
    assert (facts["reward"], facts["objective"], facts["seed"]) == (config.reward, config.objective, "0")
    assert (facts["iteration"], float(facts["path_kl"])) == ("2", result.path_kl)
    assert float(facts["kl_weight"]) == result.kl_weight
    with Image.open(result.samples_png) as sheet:
        # images of 32 pixels, enlarged four times, in a row for the base and one for the only evaluation after it
        assert 2 * 132 < sheet.height < 2.5 * 132
        assert (sheet.width - LABEL_WIDTH) % 132 == 0
    with Image.open(result.curve_png) as curve:
        assert curve.width > 500


def test_same_call_again_trains_nothing_and_gives_the_same(fitted):
    config, directory, result, _ = fitted
    seen = []
    before = {path: path.stat().st_mtime_ns for path in result.adapter_dir.iterdir()}
    again = fit_basis(config, output_dir=directory, on_progress=seen.append)
    assert seen == []
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in result.adapter_dir.iterdir()} == before


def test_interrupted_fit_resumes_to_the_same_adapter(fitted, settings, tmp_path):
    job = TrainJob.prepare(TrainConfig.parse(settings))
    announced, folder = [], CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(StoppedError):
        fit_in_process(job, folder, announced.append, should_stop=lambda: len(announced) > 1)
    assert folder.latest().name == "iteration_000001"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(metrics) + "\n" for metrics in announced))
    live = []
    resumed = fit_basis(
        job.config, output_dir=tmp_path, on_progress=lambda _: live.append(read_metrics(tmp_path / "metrics.jsonl"))
    )
    assert [line["iteration"] for line in live[-1]] == [0, 1, 2]
    assert largest_difference(resumed.adapter_dir, fitted[2].adapter_dir) == 0
    assert [line["iteration"] for line in resumed.metrics] == [0, 1, 2]


def test_more_iterations_extend_a_run(fitted, settings, tmp_path):
    config = TrainConfig.parse({**settings, "iterations": 1})
    fit_basis(config, output_dir=tmp_path)
    extended = fit_basis(config.model_copy(update={"iterations": 2}), output_dir=tmp_path)
    assert largest_difference(extended.adapter_dir, fitted[2].adapter_dir) == 0
    with pytest.raises(ResumeError, match="is of iteration 2 and iterations is 1: raise it, or train into another"):
        fit_basis(config, output_dir=tmp_path)


def test_other_settings_in_the_same_directory_are_refused(fitted, settings):
    config = TrainConfig.parse({**settings, "kl_weight": 0.7})
    with pytest.raises(ResumeError, match=r"kl_weight: 0\.01 -> 0\.7"):
        fit_basis(config, output_dir=fitted[1])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward": "beauty"}, "reward is 'beauty'.*colourfulness"),
        ({"prompts": "no-such-file.txt"}, "prompts is 'no-such-file.txt'"),
        ({"held_out_prompts": ("A red colored car.",)}, "held_out_prompts share 1 prompts"),
        ({"base_model": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_bad_input_stops_before_any_work(settings, tmp_path, changes, expected):
    with pytest.raises(ValueError, match=expected):
        fit_basis(TrainConfig.parse({**settings, **changes}), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_publishing_twice_gives_one_version(fitted, tmp_path):
    config, _, result, _ = fitted
    url = f"file://{tmp_path}"
    first = publish_fit(config, result, url, run_ids={"prefect": "a"})
    second = publish_fit(config, result, url, run_ids={"prefect": "b"})
    assert isinstance(first, AdapterRecord)
    assert (first.ref, second.ref) == ("colour@1", "colour@1")
    assert first.metrics["tuned_reward"].value == pytest.approx(result.tuned_mean)
    assert first.metrics["tuned_reward"].n == config.held_out_images
    assert first.metrics["path_kl"].value == pytest.approx(result.path_kl)
    assert first.metrics["alpha"].value == first.kl_weight == result.kl_weight
    assert first.licence == UNKNOWN_LICENCE
    assert manifest_url(first, url) == f"{url}/adapters/colour/versions/000001.json"
    assert json.loads((tmp_path / "adapters/colour/versions/000001.json").read_text())["digest"] == first.digest
    assert {file.path for file in first.files} >= {ADAPTER_FILE, "README.md", "curve.png", "metrics.jsonl"}
    fetched = Registry(open_store(url)).fetch(first, tmp_path / "fetched")
    assert largest_difference(fetched, result.adapter_dir) == 0


def test_diffusers_loads_the_adapter(fitted, tiny_sd_dir):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
    pipeline.load_lora_weights(str(fitted[2].adapter_dir))
    assert pipeline.get_active_adapters()


def first_gradient(directory: Path):
    """The gradient of the first iteration, from Adam's first moment: exp_avg = (1 - 0.9) g."""
    [state] = [read_state(path.parent) for path in directory.rglob("state.pt")]
    assert state["iteration"] == 1
    moments = state["optimizer"]["state"]
    return torch.cat([moments[key]["exp_avg"].flatten() / 0.1 for key in sorted(moments)])


@pytest.mark.slow
@pytest.mark.long
def test_two_ray_workers_take_the_gradient_of_one(cluster, settings, tmp_path):
    """On the gradient, not on the weights: Adam turns rounding in a near-zero gradient into a full step."""
    seen = []
    config = TrainConfig.parse({**settings, "iterations": 1})
    one = fit_basis(config, output_dir=tmp_path / "one")
    two = fit_basis(
        config.model_copy(update={"num_workers": 2}),
        output_dir=tmp_path / "two",
        on_progress=lambda metrics: seen.append((metrics["iteration"], threading.current_thread())),
    )
    assert seen == [(0, threading.current_thread()), (1, threading.current_thread())]
    gradients = [first_gradient(tmp_path / name / "checkpoints") for name in ("one", "two")]
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=0)
    for key in ("reward_mean", "reward_std", "grad_norm", "held_out_mean"):
        assert two.metrics[1][key] == pytest.approx(one.metrics[1][key], abs=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_two_runs_share_a_cluster_and_resume_on_it(cluster, fitted, settings, tmp_path):
    """One of them was begun in this process; both end at the adapter that this process trains."""
    configs = [TrainConfig.parse({**settings, "num_workers": 1, "name": name}) for name in ("a", "b")]
    fit_basis(configs[0].model_copy(update={"num_workers": 0, "iterations": 1}), output_dir=tmp_path / "a")
    results, errors, announced = {}, [], {"a": [], "b": []}

    def run(config):
        note = announced[config.name].append
        try:
            results[config.name] = fit_basis(
                config, output_dir=tmp_path / config.name, on_progress=note, show_bar=False
            )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    told = {name: [line["iteration"] for line in lines] for name, lines in announced.items()}
    assert told == {"a": [2], "b": [0, 1, 2]}
    for result in results.values():
        assert [line["iteration"] for line in result.metrics] == [0, 1, 2]
        assert largest_difference(result.adapter_dir, fitted[2].adapter_dir) == 0


@pytest.mark.slow
@pytest.mark.long
def test_errors_on_ray_reach_the_caller(cluster, settings, tmp_path):
    with pytest.raises(ConfigError, match=r"num_workers is 4: the Ray cluster has 2 CPUs"):
        fit_basis(TrainConfig.parse({**settings, "num_workers": 4, "held_out_images": 8}), output_dir=tmp_path / "many")
    wild = TrainConfig.parse({**settings, "num_workers": 1, "learning_rate": 1e30, "iterations": 4})
    with pytest.raises(NonFiniteError, match=r"iteration \d: .*seed"):
        fit_basis(wild, output_dir=tmp_path / "wild")
