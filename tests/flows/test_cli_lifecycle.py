"""`diffusion-blend registry` where it changes something: the gate, tags, ranges, import and single files."""

import json
from collections.abc import Callable
from pathlib import Path

from infra.registry import Registry
from infra.storage import open_store

Run = Callable[..., tuple[int, str, str]]


def evaluate(registry: Registry, ref: str, hypervolume: float) -> None:
    """Store an evaluation with a mix, both adapters and two lambdas."""
    bundle = registry.get_bundle(ref)
    facts = {"date": "2026-11-23 12:00 UTC", "adapters": {"warm": "w", "small": "s"}, "rewards": {"w": "1", "s": "1"}}

    def cell(warm: float, rewards: tuple[float, float], **changes: object) -> dict[str, object]:
        gain = {"weighted_gain": 1.0, "weighted_gain_low": 0.9, "weighted_gain_high": 1.1, "diversity": 1.0}
        weights = {"w_warm": warm, "w_small": 1 - warm, "kl_lambda": 1.0, "method": "mpa"}
        return gain | weights | dict(zip("ws", rewards, strict=True)) | changes

    cells = [
        cell(0, (0, 0), method="base", weighted_gain=None, kl_lambda=0.0),
        cell(1, (2, 0), method="adapter"),
        cell(0, (0, 2), method="adapter"),
        cell(0.5, (3, 1)),
        cell(0.5, (3, 1), kl_lambda=0.5),
    ]
    front = {
        "front": "mpa",
        "hypervolume": hypervolume,
        "hypervolume_low": hypervolume - 1,
        "hypervolume_high": hypervolume + 1,
    }
    summary = {"facts": facts, "cells": cells, "headline": ["Good."], "hypervolumes": [front]}
    path = f"evaluations/{bundle.digest}/{bundle.digest}/summary.json"
    registry.store.create(path, json.dumps(summary).encode())


def test_a_champion_must_have_been_evaluated_and_not_as_worse(run: Run, store_url: str):
    registry = Registry(open_store(store_url))
    code, _, errors = run("promote", "tiny@2", "--reason", "looks better")
    assert code == 2
    assert "tiny@2 was never evaluated" in errors
    evaluate(registry, "tiny@1", 9.0)
    evaluate(registry, "tiny@2", 5.0)
    code, _, errors = run("promote", "tiny@2", "--reason", "looks better")
    assert code == 2
    assert "tiny@2 is worse: mpa reaches a hypervolume of 5" in errors
    assert registry.get("tiny@champion").version == 1
    code, output, _ = run("promote", "tiny@2", "--reason", "looks better", "--force", "--actor", "me")
    assert (code, output) == (0, "tiny@champion is version 2 (move 2 by me: looks better; forced)\n")
    code, output, _ = run("promote", "tiny@1", "--reason", "is better", "--actor", "me")
    assert code == 0
    assert "mpa reaches a hypervolume of 9, the champion tiny@2 5 (4 to 6)" in output
    assert run("promote", "tiny@2", "--reason", "try", "--alias", "staging")[0] == 0


def test_a_tag_never_moves(run: Run, store_url: str):
    code, output, _ = run("tag", "tiny@1", "release-1", "--reason", "shipped", "--actor", "me")
    assert (code, output) == (0, "tiny@release-1 is version 1 (move 1 by me: shipped)\n")
    code, _, errors = run("tag", "tiny@2", "release-1", "--reason", "shipped")
    assert code == 2
    assert "tags do not move" in errors


def test_recommend_publishes_the_ranges_of_an_evaluation(run: Run, store_url: str):
    registry = Registry(open_store(store_url))
    assert "never evaluated" in run("recommend", "tiny@1")[2]
    evaluate(registry, "tiny@1", 9.0)
    code, output, _ = run("recommend", "tiny@1")
    assert (code, output) == (0, "tiny@3: weights small 0.5 to 1, warm 0 to 0.5; lambda 0 to 1\n")
    record = registry.get_bundle("tiny@3")
    assert (record.parent, record.adapters) == ("tiny@1", registry.get_bundle("tiny@1").adapters)
    assert run("recommend", "tiny@3")[1].startswith("tiny@3:")
    assert run("promote", "tiny@3", "--reason", "with ranges")[0] == 0


def test_show_as_a_tree(run: Run, store_url: str):
    evaluate(Registry(open_store(store_url)), "tiny@1", 9.0)
    output = run("show", "tiny@1", "--tree")[1]
    lines = [line.lstrip(" │├└─") for line in output.splitlines()]
    assert lines[0].startswith("base ")
    assert {"adapter warm@1: colourfulness, rank 4", "bundle tiny@1 (champion)"} <= set(lines)
    assert any(line.startswith("evaluation ") and line.endswith("Good.") for line in lines)


def test_import_and_single_files(
    run: Run, store_url: str, tiny_adapters: dict[str, str], tiny_sd_dir: Path, tmp_path: Path
):
    warm = tiny_adapters["warm"]
    code, output, _ = run("import", "found", warm, "--base", str(tiny_sd_dir))
    assert (code, output) == (0, "Published found@1: rank 4, alpha 4, on to_k, to_out.0, to_q, to_v\n")
    code, _, errors = run("bundle", "mixed", "found", "warm", "--guidance-scale", "2", "--steps", "4")
    assert code == 0
    assert "Warning: nothing is known of the KL of found" in errors
    code, output, _ = run("export", "mixed", str(tmp_path / "out"), "--kohya")
    assert code == 0
    assert (tmp_path / "out" / "found.safetensors").exists()
    assert "trained elsewhere" in run("show", "found", "--adapter", "--tree")[1]


def test_a_lora_that_is_not_there_is_one_clear_line(run: Run, tiny_sd_dir: Path):
    code, _, errors = run("import", "found", "nowhere", "--base", str(tiny_sd_dir))
    assert code == 2
    assert "no adapter at nowhere" in errors
    assert "Traceback" not in errors
