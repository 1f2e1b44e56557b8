"""The headline's own statistics: gains image by image, differences, and shares with prompts and seeds drawn anew."""

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workers.evaluation import EvaluateConfig
from workers.evaluation.files import SCHEMA_VERSION

MIX = {"vivid": 0.25, "small": 0.75}
SETTINGS = EvaluateConfig(bundle="any@1", resamples=500)
PROMPTS, SEEDS = 12, 5


@pytest.fixture
def gains(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    return importlib.import_module("headline_parts.gains")


def test_gains_are_those_of_the_mix_by_prompt_and_seed(gains, tmp_path):
    def row(method, weights, kl_lambda, prompt, seed, gain):
        scores = {"vivid": 2.0 * (prompt + gain), "small": 4.0 * (seed + gain)}
        where = {"method": method, "kl_lambda": kl_lambda, "prompt_index": prompt, "seed": seed}
        return where | {f"w_{name}": weight for name, weight in weights.items()} | scores

    settings = [
        ("base", dict.fromkeys(MIX, 0.0), 0.0, 0.0),
        ("adapter", {"vivid": 1.0, "small": 0.0}, 1.0, 9.0),
        ("mpa", MIX, 1.0, 3.0),
        ("mpa", MIX, 0.5, 9.0),
        ("mpa", {"vivid": 0.75, "small": 0.25}, 1.0, 9.0),
        ("oracle", MIX, 1.0, 4.0),
    ]
    rows = [
        row(method, weights, kl_lambda, prompt, seed, gain)
        for method, weights, kl_lambda, gain in settings
        for prompt in range(PROMPTS)
        for seed in range(SEEDS)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "samples.parquet")
    scales = {"vivid": {"sd": 2.0}, "small": {"sd": 4.0}}
    summary = {"schema_version": SCHEMA_VERSION, "facts": {"digest": "00"}, "scales": scales}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = gains.gains_by_image(gains.read_images(tmp_path), MIX)
    assert {name: table.shape for name, table in found.items()} == dict.fromkeys(("mpa", "oracle"), (PROMPTS, SEEDS))
    np.testing.assert_allclose(found["mpa"], 3.0)
    np.testing.assert_allclose(found["oracle"], 4.0)


def test_a_difference_is_paired_by_image(gains):
    other = np.random.default_rng(0).normal(size=(PROMPTS, SEEDS))
    more = gains.difference(other + 0.5, other, SETTINGS)
    assert (more.mean, more.low, more.high) == pytest.approx((0.5, 0.5, 0.5))
    steps = np.linspace(0.2, 1.0, PROMPTS)
    more = gains.difference(other + steps[:, None], other, SETTINGS)
    assert more.mean == pytest.approx(0.6)
    assert more.high - more.low == pytest.approx(2 * 1.96 * steps.std() / np.sqrt(PROMPTS), rel=0.15)


def test_a_share_that_is_the_same_everywhere_has_no_width(gains):
    whole = 1.0 + np.random.default_rng(0).random((PROMPTS, SEEDS))
    share = gains.share_over_seeds(0.8 * whole, whole, SETTINGS)
    assert (share.mean, share.low, share.high) == pytest.approx((0.8, 0.8, 0.8))


@pytest.mark.parametrize("axis", [0, 1])
def test_what_differs_by_prompt_or_by_seed_alone_widens_the_interval(gains, axis):
    whole = np.ones((PROMPTS, SEEDS))
    mine = whole * np.expand_dims(np.linspace(0.2, 1.0, whole.shape[axis]), 1 - axis)
    share = gains.share_over_seeds(mine, whole, SETTINGS)
    # the standard error of a mean of so many evenly spread values, drawn with replacement
    error = np.linspace(0.2, 1.0, whole.shape[axis]).std() / np.sqrt(whole.shape[axis])
    assert share.mean == pytest.approx(0.6)
    assert share.high - share.low == pytest.approx(2 * 1.96 * error, rel=0.15)
