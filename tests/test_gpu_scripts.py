"""The GPU scripts run to their end on a CPU at a tiny size; what they measure there means nothing."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "gpu"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def lines_of(capsys) -> tuple[list[dict], str]:
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return lines, "\n".join(line for line in text.splitlines() if not line.startswith("{"))


def test_the_main_script_measures_every_thing_once(script, capsys):
    from blend.preference import METHODS

    script("blend_on_gpu").main(
        ["--size", "tiny", "--device", "cpu", "--rows", "2", "6", "--repeats", "1", "--images", "1", "--steps", "2"]
    )
    lines, table = lines_of(capsys)
    assert [line["rows"] for line in lines if line["kind"] == "tile"] == [2, 6]
    assert all(line["same_bits_elsewhere"] for line in lines if line["kind"] == "neighbours")
    images = [(line["adapters"], line["method"]) for line in lines if line["kind"] == "images"]
    assert images == [(adapters, method) for adapters in (1, 2, 3, 4) for method in METHODS]
    assert any(line["kind"] == "profile" for line in lines)
    assert "| eager | 6 |" in table
    assert "neither met nor missed" in table


def test_sdxl_goes_through_tiles_and_engine_too(script, capsys):
    script("blend_on_gpu").main(
        ["--size", "tiny-xl", "--device", "cpu", "--rows", "2", "--repeats", "1", "--images", "1", "--steps", "1"]
    )
    lines, _ = lines_of(capsys)
    assert [line["rows"] for line in lines if line["kind"] == "tile"] == [2]
    assert all(line["images_per_s"] > 0 for line in lines if line["kind"] == "images")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_all_ways_to_run_adapters_agree(script, capsys):
    script("adapter_paths").main(
        ["--nets", "sprites", "--device", "cpu", "--rows", "4", "--adapters", "2", "--repeats", "1"]
    )
    lines, _ = lines_of(capsys)
    assert [line["kind"] for line in lines] == ["one-hot", "soup"]
    assert {"low_rank", "merged_groups", "merged_gathered", "peft"} <= set(lines[0])


@pytest.mark.parametrize("path", ["single", "low_rank", "merged"])
def test_memory_is_measured_for_every_path(script, capsys, path):
    script("memory").main(["--path", path, "--size", "tiny", "--pixels", "64", "--device", "cpu"])
    lines, _ = lines_of(capsys)
    assert lines[0]["weight_bytes"] > 0
    assert bool(lines[0]["merged_bytes"]) == (path == "merged")


@pytest.mark.parametrize(("size", "dtype"), [("tiny", "float32"), ("tiny-xl", "bfloat16")])
def test_fine_tuning_is_measured_in_every_case(script, capsys, size, dtype):
    options = f"--size {size} --device cpu --dtype {dtype} --images 2 --steps 2 3 --trained-steps 2 --iterations 1"
    script("finetune").main([*options.split(), "--micro-batch-rows", "2", "4", "--pixels", "32"])
    lines, table = lines_of(capsys)
    cases = [(line["steps"], line["guidance_scale"], line["gradient_checkpointing"]) for line in lines]
    assert cases[:4] == [(2, 7.5, False), (2, 7.5, False), (2, 7.5, True), (2, 7.5, True)]
    assert [case[:2] for case in cases[4:]] == [(2, 1.0), (3, 7.5), (3, 1.0)]
    assert all(line["images_per_gpu_hour"] > 0 and line["peak_gib"] > 0 for line in lines)
    assert "| 3 | 1 |" in table
    assert "neither met nor missed" in table


def test_fine_tuning_goes_on_where_a_case_does_not_fit(script, capsys, monkeypatch):
    module = script("finetune")

    def exhausted(self, case):
        if case.micro_batch_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {**asdict(case), "gpus": 1, "images_per_hour": 1.0, "images_per_gpu_hour": 1.0, "seconds": 2.0} | {
            "rollout_seconds": 1.0,
            "peak_gib": 3.0,
        }

    monkeypatch.setattr(module.Rig, "_measure", exhausted)
    module.main(["--size", "tiny", "--device", "cpu", "--micro-batch-rows", "2", "4", "--steps", "2"])
    lines, table = lines_of(capsys)
    assert [line.get("error") for line in lines] == [None, "CUDA out of memory.", None, "CUDA out of memory.", None]
    assert "| out of memory |" in table


@pytest.mark.slow
@pytest.mark.long
def test_fine_tuning_runs_under_torchrun(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    options = (
        "--size tiny --device cpu --dtype float32 --images 2 --steps 2 --trained-steps 2 --iterations 1 --pixels 32"
    )
    done = subprocess.run(
        [*command, str(SCRIPTS / "finetune.py"), *options.split(), "--micro-batch-rows", "4", "--guidance", "1"],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["gpus"], line["images"]) for line in lines] == [(2, 4), (2, 4)]
    assert done.stdout.count("## Fine-tuning tiny") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
