"""The GPU scripts run to their end on a CPU at a tiny size; what they measure there means nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

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
