"""The whole job on a tiny model of the real classes: every stage runs, is recorded, and leaves no process behind."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from PIL import Image

TINY_RUN = """
base_model = "{base}"
rewards = ["colourfulness", "compressibility"]
prompts = ["A red car.", "A blue cup."]
held_out_prompts = ["A green cup.", "A red dog."]
bundle = "tiny"
prompt = "A red car."
[training]
iterations = 2
prompts_per_iteration = 2
images_per_prompt = 4
num_inference_steps = 4
train_steps_per_sample = 2
held_out_images = 4
num_workers = 1
[evaluation]
seeds = 1
num_inference_steps = 3
methods = ["mpa"]
pair_weights = [0.5]
num_workers = 1
resamples = 100
picture_prompts = 2
"""


def started_below(directory: Path) -> list[str]:
    """Command lines of live processes whose environment or arguments lead into `directory`."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            facts = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if any(str(directory) in fact for fact in facts):
            found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
@pytest.mark.long
def test_demo_does_the_whole_job_and_leaves_nothing_running(cli, tmp_path, tiny_sd_dir):
    run = tmp_path / "tiny.toml"
    run.write_text(TINY_RUN.format(base=tiny_sd_dir))
    done = cli("demo", "--run", str(run), "--output-dir", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    [directory] = (tmp_path / "out").iterdir()
    summary = json.loads((directory / "summary.json").read_text())

    assert [adapter["reward"] for adapter in summary["adapters"]] == ["colourfulness", "compressibility"]
    assert summary["bundle"] == "tiny@1"
    assert Image.open(summary["image"]).text["prompt"] == "A red car."
    champion = json.loads((directory / "store/bundles/tiny/aliases/champion.json").read_text())
    assert champion["version"] == 1
    assert list(directory.glob("evaluation/**/*.html"))
    assert summary["url"] in done.stdout
    assert started_below(tmp_path) == []


@pytest.mark.slow
@pytest.mark.long
def test_a_failing_demo_says_what_failed_and_leaves_nothing_running(cli, tmp_path):
    run = tmp_path / "broken.toml"
    run.write_text(TINY_RUN.format(base=tmp_path / "no-such-model"))
    done = cli("demo", "--run", str(run), "--output-dir", "out")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "no-such-model" in last
    assert "error.log" in last
    assert started_below(tmp_path) == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("number", "stage"), [(signal.SIGINT, "fine-tune"), (signal.SIGTERM, "Storage: ")])
def test_an_interrupted_demo_leaves_nothing_running(started_cli, tmp_path, tiny_sd_dir, number, stage):
    """While a flow trains, and when the services are up and nothing else is."""
    run = tmp_path / "tiny.toml"
    run.write_text(TINY_RUN.format(base=tiny_sd_dir))
    demo = started_cli("demo", "--run", str(run), "--output-dir", "out")
    seen = []
    for line in demo.stdout:
        seen.append(line)
        if stage in line:
            break
    assert len(started_below(tmp_path)) > 2, "".join(seen)
    demo.send_signal(number)
    rest = demo.communicate(timeout=120)[0]
    assert demo.returncode == 130, rest
    assert "Interrupted; everything the demo started has ended." in rest
    assert started_below(tmp_path) == []
