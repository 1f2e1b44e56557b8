"""The gap as a table, a figure and a predictor: means over prompts, undefined where it is, wary of few points."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from PIL import Image, ImageColor

import blend
from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.gap import measure_gap
from blend.metrics import MetricError
from blend.model import load_model
from blend.preference import Preference
from workers.evaluation.gaps import Bootstrap, gap_against_loss, gap_png, gap_table
from workers.evaluation.style import DARK, LIGHT

PROMPTS = ("A red colored car.", "A blue cup.", "A green bird.")
SEEDS = (0, 1)
HALF = Preference(weights={"warm": 0.5, "small": 0.5})
ORACLE = Preference(weights={"oracle": 1.0})
PAIRS = [(HALF, ORACLE), (Preference(weights={"warm": 1.0}, kl_lambda=0.5), Preference(weights={"small": 1.0}))]
DISTANCES = ("relative_gap", "cosine", "distance", "oracle_shift", "blend_shift", "kl", "base_kl")


@pytest.fixture(scope="module")
def engine(tiny_sd_dir, tiny_adapters, tiny_lora, tmp_path_factory):
    model = load_model(tiny_sd_dir)
    bank = AdapterBank(model.unet)
    for name, path in {**tiny_adapters, "oracle": tiny_lora(tmp_path_factory.mktemp("oracle"), seed=9)}.items():
        bank.load(name, path)
    return BlendEngine(model, bank)


def measured(engine, pairs=PAIRS, **settings):
    return gap_table(engine, PROMPTS, SEEDS, pairs, **{"num_inference_steps": 4, **settings})


@pytest.fixture(scope="module")
def table(engine):
    return measured(engine)


def test_a_row_is_a_pair_at_a_step(table, engine):
    assert table["pair"].tolist() == [0] * 4 + [1] * 4
    assert table["step"].tolist() == [1, 2, 3, 4] * 2
    assert table["way"].tolist() == [0, 0.25, 0.5, 0.75] * 2
    assert table["timestep"].tolist() == engine.model.timesteps(4)[0].tolist() * 2
    assert table["alpha_bar"][:4].is_monotonic_increasing
    mixes = table[["method", "w_warm", "w_small", "kl_lambda", "oracle", "along"]].drop_duplicates()
    assert mixes.to_numpy().tolist() == [
        ["mpa", 0.5, 0.5, 1.0, "oracle", "blend"],
        ["mpa", 1.0, 0.0, 0.5, "small", "blend"],
    ]


def test_means_are_over_prompts_after_seeds_and_lie_in_their_intervals(table, engine):
    samples = [Sample(prompt, HALF, seed, num_inference_steps=4) for prompt in PROMPTS for seed in SEEDS]
    gap = measure_gap(engine, samples, ORACLE)
    mine = table[table["pair"] == 0]
    np.testing.assert_allclose(mine["relative_gap"], gap.relative.mean(0), rtol=1e-9)
    np.testing.assert_allclose(mine["kl"], gap.kl.mean(0), rtol=1e-9)
    np.testing.assert_allclose(mine["path_kl"], float(gap.path_kl.mean()), rtol=1e-9)
    np.testing.assert_allclose(mine["base_path_kl"], float(gap.base_path_kl.mean()), rtol=1e-9)
    # the bounds of three prompts are never beyond the means of one of them
    each = gap.relative.reshape(len(PROMPTS), len(SEEDS), -1).mean(1)
    assert (mine["relative_gap_low"] >= each.min(0).values.numpy() - 1e-12).all()
    assert (mine["relative_gap_high"] <= each.max(0).values.numpy() + 1e-12).all()
    for name in (*DISTANCES, "path_kl", "base_path_kl"):
        assert (table[f"{name}_low"] <= table[name] + 1e-12).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-12).all()


def test_settings_reach_the_engine_and_the_bootstrap(table, engine):
    for changes in ({"guidance_scale": 1.0}, {"eta": 0.5}, {"along": "oracle"}):
        other = measured(engine, PAIRS[:1], **changes)
        assert not np.allclose(other["relative_gap"], table["relative_gap"][:4])
    assert len(measured(engine, PAIRS[:1], num_inference_steps=3)) == 3
    narrow = measured(engine, PAIRS[:1], bootstrap=Bootstrap(resamples=300, seed=1, confidence=0.6))
    wide = table[:4]
    assert (narrow["kl_high"] - narrow["kl_low"] < wide["kl_high"] - wide["kl_low"]).all()
    np.testing.assert_allclose(narrow["kl"], wide["kl"], rtol=1e-9)


def test_what_is_undefined_is_nan(engine):
    told = []
    pairs = [(HALF, Preference.base()), (Preference(weights={"warm": 1.0}, kl_lambda=0.0), ORACLE)]
    table = measured(engine, pairs, eta=0.0, on_pair=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert table["relative_gap"].isna().tolist() == [True] * 4 + [False] * 4
    assert table["relative_gap"][4:].tolist() == [1.0] * 4
    for name in ("cosine", "kl", "base_kl", "path_kl", "base_path_kl"):
        assert table[[name, f"{name}_low", f"{name}_high"]].isna().all(axis=None)
    assert table["oracle"].tolist() == ["base"] * 4 + ["oracle"] * 4


def test_a_mix_as_an_oracle_is_named(engine):
    table = measured(engine, [(HALF, Preference(weights={"warm": 0.5, "small": 0.5}, kl_lambda=0.5, method="soup"))])
    assert table["oracle"].unique().tolist() == ["soup, λ 0.5: warm 0.5 + small 0.5"]


def test_every_column_is_documented(table):
    text = (Path(blend.__file__).parent / "README.md").read_text()
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    columns = {re.sub(r"_(low|high)$", "", name) for name in table.columns}
    assert {re.sub(r"^w_.*", "w_ADAPTER", name) for name in columns} <= documented


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_the_figure_shows_every_pair(table, theme, monkeypatch):
    written = watched(monkeypatch)
    picture = Image.open(io.BytesIO(gap_png(table, theme))).convert("RGB")
    assert picture.getpixel((3, 3)) == pytest.approx(ImageColor.getrgb(theme.background), abs=4)
    assert texts_of(written) == {"as far as the base", "warm 50 % + small 50 %", "warm alone · λ 0.5"}


def watched(monkeypatch):
    """The texts that figures write from here on."""
    written, annotate = [], Axes.annotate

    def watching(self, text, *arguments, **options):
        written.append(text)
        return annotate(self, text, *arguments, **options)

    monkeypatch.setattr(Axes, "annotate", watching)
    return written


def texts_of(written):
    return {" ".join(text.split()) for text in written}


def test_pairs_that_differ_in_method_or_oracle_alone_are_told_apart(table, monkeypatch):
    written = watched(monkeypatch)
    first = table[table["pair"] == 0]
    gap_png(pd.concat([first, first.assign(pair=1, method="soup"), first.assign(pair=2, oracle="other")]))
    mix = "warm 50 % + small 50 %"
    assert texts_of(written[1:]) == {f"{mix} · oracle", f"{mix} · Weight average (soup)", f"{mix} · other"}


def test_series_that_rise_together_are_as_sure_as_their_number_allows():
    gaps = {name: float(value) for value, name in enumerate("abcde")}
    losses = pd.Series({name: math.exp(gaps[name]) for name in "edcba"})
    found = gap_against_loss(gaps, losses)
    assert (found.n, found.spearman) == (5, pytest.approx(1))
    # of 5! orders one rises and one falls with it
    assert found.spearman_p == pytest.approx(2 / math.factorial(5))
    assert found.pearson_low < found.pearson == pytest.approx(np.corrcoef([*gaps.values()], losses[[*gaps]])[0, 1])
    assert str(found).startswith("n = 5: Spearman 1.00 (p = 0.017), Pearson 0.89 (")
    assert gap_against_loss(gaps, -losses).spearman == pytest.approx(-1)


def test_three_points_say_next_to_nothing():
    found = gap_against_loss([1.0, 2.0, 3.0], [1.0, 2.0, 2.5])
    assert (found.pearson_low, found.pearson_high) == (-1.0, 1.0)
    assert found.spearman_p == pytest.approx(1 / 3)


def test_many_points_without_a_connection_are_seen_as_such():
    generator = np.random.default_rng(0)
    found = gap_against_loss(generator.normal(size=40), generator.normal(size=40))
    assert found.n == 40
    assert found.pearson_low < 0 < found.pearson_high
    assert found.spearman_p > 0.05


@pytest.mark.parametrize(
    ("gaps", "losses", "what"),
    [
        ({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 2.0, "d": 3.0}, "different keys"),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}, "at least 3"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "gaps"),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 3.0], "losses"),
    ],
)
def test_what_cannot_be_correlated_is_refused(gaps, losses, what):
    with pytest.raises(MetricError, match=what):
        gap_against_loss(gaps, losses)
