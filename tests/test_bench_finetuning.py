"""The rival of the fine-tuning benchmark learns, and replays what it sampled: a slow rival must not be a broken one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    return importlib.import_module("finetuning_parts.ddpo_loop")


@pytest.fixture
def gains(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    return importlib.import_module("finetuning_gains")


def redness(images: torch.Tensor, prompts: object) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_plain_loop_learns_and_its_first_ratio_is_one(loop, tiny_sd_dir, guidance_scale):
    rival = loop.DDPOLoop(str(tiny_sd_dir), redness, steps=4, guidance_scale=guidance_scale, batch_size=8)
    rival.optimizer.param_groups[0]["lr"] = 0.1  # a tiny model has few parameters to move
    prompts, groups = ["A red colored car."] * 8 + ["A blue colored cup."] * 8, [0] * 8 + [1] * 8
    seen = [rival.iterate(prompts, groups, trained=3, seed=seed) for seed in range(6)]
    assert max(metrics["ratio_deviation"] for metrics in seen) < 1e-4
    tuned = rival.sample(prompts[:8], torch.Generator().manual_seed(0)).rewards
    rival.unet.disable_adapters()
    base = rival.sample(prompts[:8], torch.Generator().manual_seed(0)).rewards
    assert (tuned - base).mean() > 0.5 * base.std()


def test_gains_are_summed_up_over_seeds(gains):
    def line(iteration: int, mean: float, kl: float, **more: float) -> dict:
        return {
            "iteration": iteration,
            "held_out_mean": mean,
            "held_out_std": 0.5,
            "held_out_ci": 0.1,
            "held_out_path_kl": kl,
            "held_out_diversity": 0.2,
            "kl_weight": 0.01,
            "watched": {"alignment": {"mean": 0.9 - 0.001 * kl, "std": 0.1, "ci": 0.0}},
            **more,
        }

    outcomes = [gains.outcome([line(0, 1.0, 0.0), line(4, 1.0 + gain / 2, 100.0)]) for gain in (1.0, 2.0, 3.0)]
    summary = gains.summarise(outcomes)
    assert summary["mean"] == pytest.approx(2.0)
    # Student's t with two degrees of freedom: 4.303 standard errors of 1 / sqrt(3)
    assert summary["high"] - summary["mean"] == pytest.approx(4.3027 / 3**0.5, rel=1e-3)
    assert summary["path_kl"] == 100.0
    assert summary["alignment_change"] == pytest.approx(-1.0)
    assert [one["gain"] for one in summary["per_seed"]] == pytest.approx([1.0, 2.0, 3.0])
