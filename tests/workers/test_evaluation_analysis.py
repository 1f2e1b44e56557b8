"""Statistics on samples whose true means are known: shares, differences, hypervolumes and what widens them."""

import numpy as np
import pandas as pd
import pytest

from infra.comparing import ADAPTERS_ALONE
from workers.evaluation.analysis import analyse, front_members
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.grid import ADAPTER, plan_cells
from workers.evaluation.labels import (
    EXPLANATIONS,
    METHODS,
    cell_label,
    explanation,
    method_label,
    number,
    percent,
    preference_label,
)

BASIS = ("warm", "small")
REWARDS = ("colour", "size")
# Gain of each adapter alone in (colour, size): each helps its own reward and harms the other.
EFFECTS = np.array([[2.0, -1.0], [-0.5, 1.0]])
CONFIG = EvaluateConfig(prompts=("x",), resamples=400, pair_weights=(0.5,), kl_lambdas=(0.5,), methods=("mpa", "soup"))


def samples(cells, *, soup_loss=0.25, noise=0.0, prompts=12, seeds=3, effects=EFFECTS):
    """mpa gains exactly lambda * w @ EFFECTS; soup loses soup_loss in both; prompts differ a lot from each other."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 1, size=(prompts, 1, 2)) + generator.normal(0, 1, size=(prompts, seeds, 2))
    rows = []
    for index, cell in enumerate(cells):
        gain = cell.kl_lambda * (np.asarray(cell.weights) @ effects) - soup_loss * (cell.method == "soup")
        values = difficulty + gain + generator.normal(0, noise, size=difficulty.shape)
        rows += [
            {"cell": index, "prompt_index": p, "seed": s, "colour": values[p, s, 0], "size": values[p, s, 1]}
            | {"rows": 10.0 * (index + 1), "seconds": 0.1, "diversity": 0.2, "path_kl": np.nan}
            for p in range(prompts)
            for s in range(seeds)
        ]
    return pd.DataFrame(rows)


def analysed(config=CONFIG, **values):
    cells = plan_cells(config, BASIS)
    return analyse(samples(cells, **values), cells, BASIS, REWARDS, REWARDS, config)


def row_of(analysis, method, kl_lambda=1.0, warm=0.5):
    table = analysis.summary
    found = table[(table["method"] == method) & (table["kl_lambda"] == kl_lambda) & (table["w_warm"] == warm)]
    assert len(found) == 1
    return found.iloc[0]


def test_gains_are_paired_so_that_hard_prompts_do_not_widen_them():
    row = row_of(analysed(), "mpa")
    assert row["colour_gain"] == pytest.approx(0.75)
    assert row["colour_gain_high"] - row["colour_gain_low"] == pytest.approx(0, abs=1e-9)
    assert row["colour_high"] - row["colour_low"] > 0.5


def test_noise_widens_the_interval_of_a_gain_around_the_truth():
    row = row_of(analysed(noise=0.3), "mpa")
    assert row["colour_gain_low"] < 0.75 < row["colour_gain_high"]
    assert 0.05 < row["colour_gain_high"] - row["colour_gain_low"] < 0.5


def test_share_of_the_gain_is_the_weighted_gain_over_that_of_the_adapters():
    analysis = analysed()
    colour, size = (analysis.scales[name].sd for name in REWARDS)
    best = 0.5 * 2 / colour + 0.5 * 1 / size
    row = row_of(analysis, "mpa")
    assert row["share"] == pytest.approx((0.5 * 0.75 / colour + 0.5 * 0.0 / size) / best)
    assert row["weighted_gain"] == pytest.approx(0.5 * 0.75 / colour)
    # blending linearly is exactly what one adapter per image, drawn at random, would give
    assert row["switch_share"] == pytest.approx(row["share"])
    assert row_of(analysis, "adapter", warm=1.0)["share"] == pytest.approx(1)
    assert np.isnan(row_of(analysis, "base", 0.0, 0.0)["share"])


def test_share_is_undefined_where_the_adapters_gain_nothing_for_sure():
    analysis = analysed(effects=np.zeros((2, 2)), noise=0.5)
    assert analysis.summary["share"].isna().all()
    assert analysis.overall["share"].isna().all()


def test_overall_compares_methods_pairwise_with_the_first():
    overall = analysed(noise=0.05).overall.set_index("method")
    assert list(overall.index) == ["mpa", "soup"]
    assert np.isnan(overall.loc["mpa", "difference"])
    assert overall.loc["soup", "difference"] == pytest.approx(
        overall.loc["soup", "share"] - overall.loc["mpa", "share"]
    )
    assert overall.loc["soup", "difference_high"] < 0
    alike = analysed(noise=0.05, soup_loss=0.0).overall.set_index("method").loc["soup"]
    assert alike["difference_low"] < 0 < alike["difference_high"]


def test_hypervolumes_count_from_the_stated_reference():
    analysis = analysed()
    fronts = analysis.fronts.set_index("front")
    # the base lies reference_sds above the reference in both rewards
    assert fronts.loc["base", "hypervolume"] == pytest.approx(2.0**2)
    assert fronts.loc[ADAPTERS_ALONE, "ratio"] == pytest.approx(1)
    assert fronts.loc["mpa", "hypervolume"] > fronts.loc["soup", "hypervolume"]
    assert fronts.loc["mpa, any lambda", "hypervolume"] >= fronts.loc["mpa", "hypervolume"]
    wider = analysed(CONFIG.model_copy(update={"reference_sds": 3.0})).fronts.set_index("front")
    assert wider.loc["base", "hypervolume"] == pytest.approx(3.0**2)


def test_every_front_holds_the_base_and_the_adapters():
    members = front_members(plan_cells(CONFIG, BASIS))
    assert set(members) == {"base", ADAPTERS_ALONE, "mpa", "mpa, any lambda", "soup"}
    assert all({0, 1, 2} <= set(picked) for name, picked in members.items() if name != "base")


def test_the_front_is_marked():
    summary = analysed().summary.set_index("cell")
    assert summary.loc[1, "pareto"]
    assert not summary[summary["method"] == "soup"]["pareto"].any()


def test_confidence_resamples_and_seed_move_the_intervals():
    def width(**values):
        row = row_of(analysed(CONFIG.model_copy(update=values), noise=0.3), "mpa")
        return row["colour_gain_high"] - row["colour_gain_low"]

    assert width(confidence=0.6) < width(confidence=0.95) < width(confidence=0.999)
    assert width(bootstrap_seed=0) == width(bootstrap_seed=0) != width(bootstrap_seed=1)
    assert width(resamples=400) != width(resamples=500)


def test_costs_are_means_over_samples():
    row = row_of(analysed(), "mpa")
    assert (row["prompts"], row["samples"]) == (12, 36)
    assert row["rows"] == 10 * (row["cell"] + 1)


def test_a_reward_that_the_base_never_varies_in_keeps_its_own_unit():
    cells = plan_cells(CONFIG, BASIS)
    frame = samples(cells)
    frame["size"] = np.where(frame["cell"] == 0, 1.0, 2.0)
    analysis = analyse(frame, cells, BASIS, REWARDS, REWARDS, CONFIG)
    assert analysis.scales["size"].sd == 1.0


def test_labels_say_what_was_measured():
    rows = analysed().summary.to_dict("records")
    labels = [cell_label(row, BASIS) for row in rows]
    assert labels[:3] == ["Base model", "warm alone", "small alone"]
    assert "Blend (MPA) · warm 50 % + small 50 %" in labels
    assert "Blend (MPA) · warm 50 % + small 50 % · λ 0.5" in labels
    assert len(set(labels)) == len(labels)
    assert preference_label({"w_a": 1 / 3, "w_b": 1 / 3, "w_c": 1 / 3}, ("a", "b", "c")) == "all 3 equally"
    assert method_label("mpa, any lambda") == "Blend (MPA), any λ"


@pytest.mark.parametrize(
    ("method", "label", "words"),
    [
        ("best_of_3", "Best of 3", "3 images"),
        ("code_20_5", "CoDe (N = 20, block 5)", "20 candidates every 5 steps"),
        ("rgg_2", "Reward guidance (RGG, scale 2)", "2 times"),
        ("rgg_0.25", "Reward guidance (RGG, scale 0.25)", "0.25 times"),
        ("switch", "LoRA Switch", "in turn"),
        ("composite", "LoRA Composite", "evenly"),
        ("oracle", "Retrained (oracle)", "exactly this preference"),
        ("mpa, any lambda", "Blend (MPA), any λ", "second dial"),
        ("best_of_all", "best_of_all", ""),
        ("code_20", "code_20", ""),
        ("rgg_2_3", "rgg_2_3", ""),
        ("someones_9", "someones_9", ""),
    ],
)
def test_methods_are_named_and_explained(method, label, words):
    assert method_label(method) == label
    assert words in explanation(method)
    assert bool(explanation(method)) == bool(words)


def test_every_method_with_a_name_but_that_of_one_adapter_is_explained():
    assert set(METHODS) - set(EXPLANATIONS) == {ADAPTER}
    row = {"method": "code_20_5", "w_warm": 0.5, "w_small": 0.5, "kl_lambda": 1.0}
    assert cell_label(row, BASIS) == "CoDe (N = 20, block 5) · warm 50 % + small 50 %"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.1234, 3, "0.123"), (-2.2174, 3, "−2.217"), (40.0, 0, "40"), (123.456, 3, "123.5"), (1234.5, 3, "1,234")],
)
def test_numbers_are_short(value, digits, text):
    assert number(value, digits) == text


def test_undefined_numbers_are_dashes():
    assert number(float("nan")) == percent(float("nan")) == "–"
    assert percent(-0.124) == "−12 %"


def test_known_deviations_of_the_base_are_the_unit_of_gains():
    cells = plan_cells(CONFIG, BASIS)
    frame = samples(cells)
    own = analyse(frame, cells, BASIS, REWARDS, REWARDS, CONFIG)
    known = analyse(frame, cells, BASIS, REWARDS, REWARDS, CONFIG, {"colour": 2 * own.scales["colour"].sd})
    assert known.scales["colour"].sd == pytest.approx(2 * own.scales["colour"].sd)
    assert known.scales["colour"].mean == own.scales["colour"].mean
    assert known.scales["size"] == own.scales["size"]
    alone = row_of(own, "adapter", warm=1.0), row_of(known, "adapter", warm=1.0)
    assert alone[1]["weighted_gain"] == pytest.approx(alone[0]["weighted_gain"] / 2)
    assert alone[1]["colour_gain"] == alone[0]["colour_gain"]
