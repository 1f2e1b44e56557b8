"""The verb `train` as a user types it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.cli import main

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
num_workers = {workers}
"""


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the verb run in this process, which has everything imported."""
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    streams = capsys.readouterr()
    return int(stopped.value.code or 0), streams.out, streams.err


def test_train_shows_progress_and_publishes(tiny_sd_dir: Path, tmp_path: Path, capsys):
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(base=tiny_sd_dir, iterations=2, workers=0))
    places = ["--output", str(tmp_path / "out"), "--store-url", f"file://{tmp_path / 'store'}"]
    code, stdout, stderr = command(capsys, str(run), *places)
    assert code == 0, stderr
    assert "Published colour@1" in stdout
    assert [line.split(":")[0] for line in stderr.splitlines() if line.startswith("train colour")] == [
        f"train colour {i}/2" for i in range(3)
    ]
    assert "base standard deviations) at a path KL of" in stdout
    assert (tmp_path / "out" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("how", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_an_interrupted_run_says_how_to_go_on_and_does(tiny_sd_dir: Path, tmp_path: Path, capsys, how, workers):
    """In the command's own process, and with a worker on a Ray cluster of its own, which ends with it."""
    run, out = tmp_path / "run.toml", tmp_path / "out"
    run.write_text(RUN.format(base=tiny_sd_dir, iterations=100_000, workers=workers))
    places = ["--output", str(out), "--checkpoints", str(tmp_path / "kept"), "--no-publish"]
    started = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "train", str(run), *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell may start tests in the background, where SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 4:
        assert started.poll() is None, started.communicate()
        time.sleep(0.1)
    family = psutil.Process(started.pid).children(recursive=True)
    assert family or not workers
    os.kill(started.pid, how)
    stdout, stderr = started.communicate(timeout=120)
    assert psutil.wait_procs(family, timeout=120)[1] == []
    assert (started.returncode, stdout) == (130, ""), stderr
    last = stderr.strip().splitlines()[-1]
    assert last == "Interrupted: run the same command again to resume from the last checkpoint."
    assert "Traceback" not in stderr
    reached = max(int(path.name.split("_")[1]) for path in (tmp_path / "kept").glob("iteration_*"))
    run.write_text(RUN.format(base=tiny_sd_dir, iterations=reached + 2, workers=0))
    code, _, stderr = command(capsys, str(run), *places)
    assert code == 0, stderr
    assert f"train colour {reached + 1}/{reached + 2}" in stderr
    assert f"train colour {reached}/" not in stderr
    written = [line.split(",")[0] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert written == [f'{{"iteration": {i}' for i in range(reached + 3)]


@pytest.mark.parametrize(
    ("iterations", "store", "expected"),
    [("0", "store", "iterations is 0"), ("1", "run.toml", "run.toml")],
)
def test_errors_are_one_line_and_exit_2(tiny_sd_dir: Path, tmp_path: Path, capsys, iterations, store, expected):
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(base=tiny_sd_dir, iterations=iterations, workers=0))
    places = ["--output", str(tmp_path / "out"), "--store-url", f"file://{tmp_path / store}"]
    code, _, stderr = command(capsys, str(run), *places)
    assert code == 2
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert expected in last
    assert not (tmp_path / "out").exists()
