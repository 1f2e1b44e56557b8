"""The verb `train` as a user types it, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
name = "colour"
base_model = "{base}"
reward = "colourfulness"
prompts = ["A red colored car.", "A blue colored cup."]
held_out_prompts = ["A green colored car."]
held_out_images = 2
rank = 2
iterations = {iterations}
prompts_per_iteration = 1
images_per_prompt = 2
num_inference_steps = 2
train_steps_per_sample = 1
num_workers = 0
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "train", *arguments], capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_train_shows_progress_and_publishes(tiny_sd_dir: Path, tmp_path: Path):
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(base=tiny_sd_dir, iterations=2))
    done = command(str(run), "--output", str(tmp_path / "out"), "--store-url", f"file://{tmp_path / 'store'}")
    assert done.returncode == 0, done.stderr
    assert "Published colour@1" in done.stdout
    assert "train colour" in done.stderr
    assert "2/2" in done.stderr
    assert (tmp_path / "out" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("iterations", "store", "expected"),
    [("0", "store", "iterations is 0"), ("1", "run.toml", "run.toml")],
)
def test_errors_are_one_line_and_exit_2(tiny_sd_dir: Path, tmp_path: Path, iterations, store, expected):
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(base=tiny_sd_dir, iterations=iterations))
    done = command(str(run), "--output", str(tmp_path / "out"), "--store-url", f"file://{tmp_path / store}")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert expected in last
    assert not (tmp_path / "out").exists()
