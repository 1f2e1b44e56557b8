"""Statistics with oracles and rivals on samples whose true gains are known: shares, gaps, differences, distances."""

import numpy as np
import pandas as pd
import pytest

from infra.comparing import ADAPTERS_ALONE
from workers.evaluation.analysis import analyse, front_members
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.grid import ADAPTER, BASE, ORACLE, Cell
from workers.evaluation.oracle_shares import oracle_columns, rival_columns
from workers.evaluation.shares import UNDEFINED, ratio

BASIS = ("warm", "small")
REWARDS = ("colour", "size")
CONFIG = EvaluateConfig(prompts=("x",), resamples=200)
ONE, OTHER, EVEN, MOST = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.2)
# Gain of the oracle in (colour, size) at each preference; one adapter alone gains what is at its own end.
GAINS = {ONE: (2.0, -1.0), OTHER: (-0.5, 1.0), EVEN: (1.2, 0.4), MOST: (1.8, -0.2)}
ALONE = [Cell(BASE, (0.0, 0.0), 0.0), Cell(ADAPTER, ONE, 1.0), Cell(ADAPTER, OTHER, 1.0)]
ORACLES = [Cell(ORACLE, EVEN, 1.0), Cell(ORACLE, MOST, 1.0)]


def both(method):
    return [Cell(method, EVEN, 1.0), Cell(method, MOST, 1.0)]


def samples(cells, kept=None, *, noise=0.0, prompts=12, seeds=3, gains=None, shift=None, judged=False):
    """Each cell gains kept.get(cell or method, 1) of its oracle's at lambda, plus its shift; prompts differ a lot."""
    kept, shift, gains = kept or {}, shift or {}, gains or GAINS
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 1, size=(prompts, 1, 2)) + generator.normal(0, 1, size=(prompts, seeds, 2))
    rows = []
    for index, cell in enumerate(cells):
        factor = cell.kl_lambda * kept.get(cell, kept.get(cell.method, 1.0))
        gain = factor * np.asarray(gains.get(cell.weights, (0.0, 0.0))) + shift.get(cell.method, 0.0)
        values = difficulty + gain + generator.normal(0, noise, size=difficulty.shape)
        judge = {"colour_right": 1.0, "object_right": 0.0, "binding_right": float(index % 2)} if judged else {}
        rows += [
            {"cell": index, "prompt_index": p, "seed": s, "colour": values[p, s, 0], "size": values[p, s, 1]}
            | {"rows": 10.0 * (index + 1), "seconds": 0.1 * index, "diversity": 0.2, "path_kl": float(index)}
            | {"decodes": 1 + index, "gradients": 2 * index, "memory_mb": 100.0 * index + p}
            | judge
            for p in range(prompts)
            for s in range(seeds)
        ]
    return pd.DataFrame(rows)


def analysed(cells, kept=None, *, config=CONFIG, **values):
    cells = [*ALONE, *cells]
    return analyse(samples(cells, kept, **values), cells, BASIS, REWARDS, REWARDS, config)


def only(table, **values):
    for name, value in values.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def weighted(analysis, weights, gain=None):
    """A gain in rewards, weighted and in standard deviations of the base."""
    gain = gain or GAINS[weights]
    return sum(w * g / analysis.scales[name].sd for w, g, name in zip(weights, gain, REWARDS, strict=True))


def width(row, name):
    return row[f"{name}_high"] - row[f"{name}_low"]


def test_a_method_that_loses_a_fifth_has_four_fifths_of_the_oracle_everywhere():
    analysis = analysed([*both("mpa"), *ORACLES], {"mpa": 0.8})
    assert list(analysis.oracles) == oracle_columns(BASIS)
    assert list(zip(analysis.oracles["cell"], analysis.oracles["w_warm"], strict=True)) == [
        *((3, 0.5), (5, 0.5), (4, 0.8), (6, 0.8))
    ]
    for weights in (EVEN, MOST):
        row = only(analysis.oracles, method="mpa", w_warm=weights[0])
        assert row["share_of_oracle"] == pytest.approx(0.8)
        assert row["oracle_gain"] == pytest.approx(weighted(analysis, weights))
        assert row["weighted_gain"] == pytest.approx(0.8 * row["oracle_gain"])
        assert row["gap"] == pytest.approx(-0.2 * row["oracle_gain"])
        assert (row["rows"], row["path_kl"]) == (10.0 * (row["cell"] + 1), row["cell"])
        assert row["oracle_path_kl"] == row["cell"] + 2
        oracle = only(analysis.oracles, method=ORACLE, w_warm=weights[0])
        assert oracle["share_of_oracle"] == oracle["share_of_oracle_low"] == oracle["share_of_oracle_high"] == 1
        assert oracle["gap"] == oracle["gap_low"] == oracle["gap_high"] == 0
    assert only(analysis.rivals, method="mpa")["share_of_oracle"] == pytest.approx(0.8)


def test_comparisons_are_paired_so_that_hard_prompts_do_not_widen_them():
    analysis = analysed([*both("mpa"), *both("switch"), *ORACLES], {"mpa": 0.8, "switch": 0.5})
    row, rival = only(analysis.oracles, cell=3), only(analysis.rivals, method="switch")
    for found, name in ((row, "gap"), (row, "share_of_oracle"), (rival, "difference"), (rival, "share_of_oracle")):
        assert width(found, name) == pytest.approx(0, abs=1e-9)
    # the same prompts do widen what is not a comparison
    assert width(analysis.summary.iloc[3], "colour") > 0.5


def test_noise_widens_intervals_around_the_truth():
    def found(noise):
        analysis = analysed([*both("mpa"), *both("switch"), *ORACLES], {"mpa": 0.8, "switch": 0.5}, noise=noise)
        row, rival = only(analysis.oracles, cell=3), only(analysis.rivals, method="switch")
        truth = np.mean([-0.3 * weighted(analysis, weights) for weights in (EVEN, MOST)])
        assert row["share_of_oracle_low"] < 0.8 < row["share_of_oracle_high"]
        assert rival["share_of_oracle_low"] < 0.5 < rival["share_of_oracle_high"]
        assert rival["difference_low"] < truth < rival["difference_high"]
        return [width(row, "gap"), width(row, "share_of_oracle"), width(rival, "difference")]

    assert (np.array(found(0.4)) > 2 * np.array(found(0.1))).all()


def test_the_interval_of_a_gap_is_as_wide_as_its_standard_error_says():
    config = CONFIG.model_copy(update={"resamples": 2000})
    analysis = analysed([*both("mpa"), *ORACLES], noise=0.3, prompts=60, seeds=2, config=config)
    variance = sum((0.5 * 0.3 / analysis.scales[name].sd) ** 2 for name in REWARDS) * 2 / (60 * 2)
    assert width(only(analysis.oracles, cell=3), "gap") == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.25)


def test_a_share_is_undefined_where_the_oracle_gains_nothing_for_sure():
    flat = {**GAINS, EVEN: (0.0, 0.0), MOST: (0.0, 0.0)}
    analysis = analysed([*both("mpa"), *ORACLES], gains=flat, noise=0.5, shift={"mpa": 0.5})
    assert analysis.oracles["share_of_oracle"].isna().all()
    assert analysis.rivals["share_of_oracle"].isna().all()
    assert (analysis.oracles["gap"].abs() > 0).sum() == 2
    # where it does gain for sure, it does not matter that a method loses
    worse = analysed([*both("mpa"), *ORACLES], {"mpa": -0.5}, noise=0.1)
    assert only(worse.oracles, cell=3)["share_of_oracle"] == pytest.approx(-0.5, abs=0.1)


def test_a_resample_without_any_gain_has_no_ratio():
    draws, whole = np.full(100, 0.5), np.append(np.ones(99), 0.0)
    found = ratio(0.5, draws, 1.0, whole, 0.95)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    assert ratio(0.5, draws, 1.0, np.append(np.ones(95), np.zeros(5)), 0.95) is UNDEFINED


def test_strengths_of_one_adapter_are_compared_with_retraining_at_that_strength():
    dial = [Cell("mpa", ONE, 0.5), Cell("mpa", ONE, 2.0), Cell(ORACLE, ONE, 0.5), Cell(ORACLE, ONE, 2.0)]
    analysis = analysed([*both("mpa"), *dial, *ORACLES], {dial[0]: 0.9, dial[1]: 0.7})
    for cell, truth in ((5, 0.9), (6, 0.7)):
        row = only(analysis.oracles, cell=cell)
        assert (row["share_of_oracle"], row["w_warm"]) == (pytest.approx(truth), 1.0)
        assert row["oracle_gain"] == pytest.approx(row["kl_lambda"] * weighted(analysis, ONE))
        assert row["oracle_path_kl"] == cell + 2
    # the adapter has lambda 1, at which nothing was retrained; nor do other strengths count among the preferences
    assert ADAPTER not in set(analysis.oracles["method"])
    assert set(analysis.rivals["preferences"]) == {2}
    again = analysed([Cell(ORACLE, ONE, 1.0)], {ORACLE: 2.0})
    assert only(again.oracles, method=ADAPTER)["share_of_oracle"] == pytest.approx(0.5)
    assert list(again.rivals["method"]) == [ORACLE]


def test_a_rival_counts_where_it_and_an_oracle_were_measured():
    unknown = (0.3, 0.7)
    cells = [*both("mpa"), Cell("best_of_3", MOST, 1.0), Cell("best_of_3", unknown, 1.0), *both("switch"), *ORACLES]
    kept = {cells[0]: 0.5, cells[1]: 1.0, cells[2]: 0.7, cells[3]: 9.0, "switch": 1.0}
    analysis = analysed(cells, kept, gains={**GAINS, unknown: (1.0, 1.0)})
    gains = {weights: weighted(analysis, weights) for weights in (EVEN, MOST)}
    rivals = analysis.rivals
    assert list(rivals) == rival_columns()
    rivals = rivals.set_index("method")
    assert dict(rivals["preferences"]) == {"mpa": 2, "best_of_3": 1, "switch": 2, ORACLE: 2}
    # the ratio of sums, which is no mean of ratios
    shares, differences = rivals["share_of_oracle"], rivals["difference"]
    assert shares["mpa"] == pytest.approx((0.5 * gains[EVEN] + gains[MOST]) / sum(gains.values()))
    assert abs(shares["mpa"] - 0.75) > 0.01
    assert shares["best_of_3"] == pytest.approx(0.7)
    assert shares[ORACLE] == 1
    assert np.isnan(differences["mpa"])
    assert differences["best_of_3"] == pytest.approx(-0.3 * gains[MOST])
    assert differences["switch"] == differences[ORACLE] == pytest.approx(0.5 * gains[EVEN] / 2)


def test_differences_need_a_blend_to_differ_from():
    rivals = analysed([*both("switch"), Cell("mpa", (0.3, 0.7), 1.0), *ORACLES], {"switch": 0.6}).rivals
    assert rivals["difference"].isna().all()
    assert set(rivals["method"]) == {"switch", ORACLE}


def test_costs_and_verdicts_of_a_rival_are_means_over_its_cells():
    analysis = analysed([*both("mpa"), *both("rgg_2"), *ORACLES], judged=True)
    assert list(analysis.rivals) == rival_columns(judged=True)
    row = only(analysis.rivals, method="rgg_2")  # cells 5 and 6
    assert (row["rows"], row["decodes"], row["gradients"]) == (65.0, 6.5, 11.0)
    assert (row["seconds"], row["path_kl"], row["binding_right"]) == (pytest.approx(0.55), 5.5, 0.5)
    # the most that any item took, then the mean over cells
    assert row["memory_mb"] == (511.0 + 611.0) / 2


def test_the_summary_has_what_the_samples_have():
    cells = [*ALONE, *both("mpa"), *ORACLES]
    frame = samples(cells, judged=True)
    frame.loc[(frame["cell"] == 3) & (frame["prompt_index"] < 6), "colour_right"] = np.nan
    frame.loc[(frame["cell"] == 3) & (frame["prompt_index"] == 6), "colour_right"] = 0.0
    frame.loc[frame["cell"] == 4, "memory_mb"] = np.nan
    summary = analyse(frame, cells, BASIS, REWARDS, REWARDS, CONFIG).summary
    row = summary.iloc[3]
    assert (row["decodes"], row["gradients"], row["memory_mb"]) == (4, 6, 311.0)
    # prompts that the judge cannot read do not count
    assert (row["colour_right"], row["object_right"], row["binding_right"]) == (pytest.approx(5 / 6), 0, 1)
    assert np.isnan(summary.iloc[4]["memory_mb"])
    old = frame.drop(columns=["decodes", "gradients", "memory_mb", "colour_right", "object_right", "binding_right"])
    summary = analyse(old, cells, BASIS, REWARDS, REWARDS, CONFIG).summary
    assert summary[["decodes", "gradients", "memory_mb"]].isna().all().all()
    assert "binding_right" not in summary


def test_without_oracles_there_are_tables_without_rows():
    analysis = analysed([*both("mpa"), *both("best_of_3")])
    assert (len(analysis.oracles), len(analysis.rivals)) == (0, 0)
    assert (list(analysis.oracles), list(analysis.rivals)) == (oracle_columns(BASIS), rival_columns())
    assert analysis.fronts[["igd", "igd_low", "igd_high"]].isna().all().all()


def test_the_oracle_front_is_no_way_from_itself_and_others_as_far_as_they_are_shifted():
    # its one oracle beats base and adapters in both rewards: the front of the oracles is one point
    gains, even = {**GAINS, EVEN: (3.0, 3.0)}, [Cell("mpa", EVEN, 1.0), Cell(ORACLE, EVEN, 1.0)]

    def igd(shift, **values):
        return only(analysed(even, gains=gains, shift={"mpa": -shift}, **values).fronts, front="mpa")

    fronts = analysed(even, gains=gains).fronts.set_index("front")
    scale = {name: found.sd for name, found in analysed(even).scales.items()}
    assert tuple(fronts.loc[ORACLE, ["igd", "igd_low", "igd_high"]]) == (0, 0, 0)
    assert fronts.loc[BASE, "igd"] == pytest.approx(np.hypot(3 / scale["colour"], 3 / scale["size"]))
    assert fronts.loc[ADAPTERS_ALONE, "igd"] < fronts.loc[BASE, "igd"]
    assert igd(0.0)["igd"] == 0
    for shift in (0.1, 0.4):
        row = igd(shift)
        assert row["igd"] == pytest.approx(np.hypot(shift / scale["colour"], shift / scale["size"]))
        assert width(row, "igd") == pytest.approx(0, abs=1e-9)
    assert igd(-0.5)["igd"] == 0
    noisy = igd(0.4, noise=0.3)
    assert noisy["igd_low"] < igd(0.4)["igd"] < noisy["igd_high"]


def test_oracles_of_other_strengths_are_on_no_front():
    strong = [Cell("mpa", ONE, 2.0), Cell(ORACLE, ONE, 2.0)]
    cells = [*ALONE, *both("mpa"), *both("code_4_2"), *ORACLES]
    members = front_members([*cells, *strong])
    assert list(members) == [BASE, ADAPTERS_ALONE, "mpa", "mpa, any lambda", "code_4_2", ORACLE]
    assert members[ORACLE] == (0, 1, 2, 7, 8)
    assert members["code_4_2"] == (0, 1, 2, 5, 6)
    assert ORACLE not in front_members([*ALONE, *strong])
    plain, more = (analysed(rest, {"mpa": 0.8}).fronts for rest in (cells[3:], [*cells[3:], *strong]))
    assert only(more, front="mpa")["igd"] == only(plain, front="mpa")["igd"] > 0


def test_overall_differences_are_over_the_preferences_that_both_have():
    cells = [Cell("best_of_3", MOST, 1.0), *both("mpa"), Cell("switch", (0.3, 0.7), 1.0), *ORACLES]
    kept = {cells[0]: 0.7, cells[1]: 0.2, cells[2]: 1.0}
    analysis = analysed(cells, kept, noise=1e-6)
    # the first is the blend, in whatever order the cells come
    assert list(analysis.overall["method"]) == ["mpa", "best_of_3", "switch", ORACLE]
    overall = analysis.overall.set_index("method")
    assert dict(overall["preferences"]) == {"mpa": 2, "best_of_3": 1, "switch": 1, ORACLE: 2}
    best = weighted(analysis, MOST, (2.0, 1.0))
    assert overall.loc["best_of_3", "share"] == pytest.approx(0.7 * weighted(analysis, MOST) / best, abs=1e-4)
    assert overall.loc["best_of_3", "difference"] == pytest.approx(-0.3 * weighted(analysis, MOST) / best, abs=1e-4)
    naive = overall.loc["best_of_3", "share"] - overall.loc["mpa", "share"]
    assert abs(overall.loc["best_of_3", "difference"] - naive) > 0.05
    # one that shares none of the blend's preferences has a share, and nothing to differ from
    assert overall.loc["switch", "share"] == pytest.approx(0, abs=1e-4)
    assert np.isnan(overall.loc["switch", "difference"])
    assert np.isnan(overall.loc["mpa", "difference"])


def test_weights_that_differ_by_rounding_alone_are_one_preference():
    third, same = (1 / 3, 2 / 3), (0.333333333, 0.666666667)
    gains = {**GAINS, third: (1.0, 0.5), same: (1.0, 0.5)}
    analysis = analysed([Cell("mpa", third, 1.0), Cell(ORACLE, same, 1.0)], {"mpa": 0.8}, gains=gains)
    assert only(analysis.rivals, method="mpa")["share_of_oracle"] == pytest.approx(0.8)
