"""More rewards: the mixes differ in their number alone, and the figures follow from the samples."""

import importlib
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workers.evaluation import EvaluateConfig
from workers.evaluation.gaps import Bootstrap
from workers.evaluation.grid import plan_cells

BENCH = Path(__file__).parent / "bench"
RUN = Path(__file__).parents[1] / "infra" / "runs" / "growth.toml"
SIX = ("brightness", "colourfulness", "compressibility", "contrast", "sharpness", "warmth")
SDS = {"light": 0.5, "vivid": 2.0, "small": 4.0}
REWARDS = dict(zip("abc", SDS, strict=True))
# gain of each adapter alone in each reward, in deviations of the base
EFFECTS = {"a": (2.0, 0.0, -1.0), "b": (1.0, 4.0, 0.0), "c": (-1.0, 2.0, 2.0)}
EXTRA = {"mpa": 0.0, "ls": 0.5, "soup": -0.25}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def sample(cell, method, mix, prompt, seed):
    """One row: rewards linear in the weights, on top of what the prompt and the seed give to every setting alike."""
    gains = [sum(EFFECTS[one][place] for one in mix) / max(1, len(mix)) + EXTRA.get(method, 0.0) for place in range(3)]
    scores = {name: sd * (gain + prompt + seed / 8) for (name, sd), gain in zip(SDS.items(), gains, strict=True)}
    rows = 40.0 * (len(mix) if method == "mpa" else 1)
    weights = {f"w_{name}": 1 / len(mix) if name in mix else 0.0 for name in REWARDS}
    costs = {"rows": rows, "binding_right": float(prompt > 0), "diversity": 0.3}
    where = {"cell": cell, "method": method, "kl_lambda": float(bool(mix)), "prompt_index": prompt, "seed": seed}
    return where | weights | costs | scores


@pytest.fixture
def samples():
    mixes = [mix for count in (2, 3) for mix in combinations("abc", count)]
    settings = [("base", ()), *(("adapter", (name,)) for name in "abc")]
    settings += [(method, mix) for method in EXTRA for mix in mixes]
    return pd.DataFrame(
        sample(cell, *setting, prompt, seed)
        for cell, setting in enumerate(settings)
        for prompt in range(4)
        for seed in range(2)
    )


@pytest.fixture
def growth(bench, samples):
    return bench("growth_parts.tables").Growth(samples, REWARDS, SDS, Bootstrap(resamples=100))


@pytest.fixture
def table(growth):
    return growth.table().set_index(["method", "rewards"])


def test_every_reward_is_in_as_many_mixes_of_a_size_as_every_other():
    config = EvaluateConfig.from_toml(RUN)
    cells = plan_cells(config, SIX)
    mixes = [cell.active for cell in cells if cell.method == "mpa"]
    sizes = {count: [mix for mix in mixes if len(mix) == count] for count in sorted({len(mix) for mix in mixes})}
    assert {count: len(found) for count, found in sizes.items()} == {2: 3, 3: 2, 4: 3, 6: 1}
    for found in sizes.values():
        assert len(set(Counter(one for mix in found for one in mix).values())) == 1
    assert {frozenset(range(6)) - set(mix) for mix in sizes[4]} == {frozenset(mix) for mix in sizes[2]}
    for cell in cells[1:]:
        weights = [weight for weight in cell.weights if weight]
        assert weights == pytest.approx([1 / len(weights)] * len(weights), abs=1e-5)


def test_gain_per_reward_is_the_mean_over_the_rewards_of_each_mix(table):
    # a + b: 1.5 and 2; a + c: 0.5 and 0.5; b + c: 3 and 1
    assert table.gain["mpa", 2] == pytest.approx((1.75 + 0.5 + 2.0) / 3)
    assert table.gain["mpa", 3] == pytest.approx((2 / 3 + 2 + 1 / 3) / 3)
    assert table.gain["adapter", 1] == pytest.approx((2 + 4 + 2) / 3)
    assert list(table.loc[["mpa", "adapter"], "mixes"]) == [3, 1, 3]


def test_what_is_kept_is_each_reward_against_its_own_adapter(table, growth):
    # a + b: 1.5 / 2 and 2 / 4; a + c: 0.5 / 2 twice; b + c: 3 / 4 and 1 / 2
    assert table.kept["mpa", 2] == pytest.approx((0.625 + 0.25 + 0.625) / 3)
    assert table.kept["adapter", 1] == pytest.approx(1)
    one_by_one = growth.by_reward().set_index(["method", "rewards", "adapter"])
    assert one_by_one.kept["mpa", 2, "b"] == pytest.approx((0.5 + 0.75) / 2)
    assert one_by_one.gain["mpa", 2, "a"] == pytest.approx((1.5 + 0.5) / 2)
    assert one_by_one.sort_index().loc[("mpa", 3)].gain.mean() == pytest.approx(table.gain["mpa", 3])


def test_one_adapter_for_each_image_is_what_a_linear_blend_would_be(table):
    for name in ("gain", "kept"):
        assert list(table.loc["drawn", name]) == pytest.approx(list(table.loc["mpa", name]))


def test_differences_are_paired_and_costs_are_those_of_the_base(table):
    assert list(table.difference["ls"]) == pytest.approx([0.5, 0.5])
    assert list(table.difference_low["soup"]) == pytest.approx([-0.25, -0.25])
    assert list(table.rows_ratio["mpa"]) == pytest.approx([2, 3])
    assert table.binding_right["ls", 3] == pytest.approx(0.75)
    assert table.binding_right_low["ls", 3] < 0.75 < table.binding_right_high["ls", 3]
    assert table.rows_ratio.isna()["drawn"].all()


def test_company_is_what_the_others_adapters_do_alone(bench, growth):
    design = bench("growth_parts.design")
    assert growth.effects().tolist() == [pytest.approx(row) for row in EFFECTS.values()]
    assert design.company(growth.effects(), [(0, 1)]) == pytest.approx((0.0 + 1.0) / 2)
    assert design.company(growth.effects(), [(0, 1, 2)]) == pytest.approx((0 - 1 + 1 + 0 - 1 + 2) / 6)


def test_the_fairest_design_has_friends_and_foes_in_every_size(bench):
    """Six rewards in two camps: adapters of one camp help each other, and hurt the other's."""
    design = bench("growth_parts.design")
    camps = np.array([1, 1, 1, -1, -1, -1])
    effects = np.outer(camps, camps)
    found = design.fairest(effects)
    # pairs within the camps and one across, triples of both; the camps themselves would be 1 where all six have -0.2
    assert {count: design.company(effects, mixes) for count, mixes in found.items()} == {
        2: pytest.approx(1 / 3),
        3: pytest.approx(-1 / 3),
        4: pytest.approx(-1 / 9),
        6: pytest.approx(-1 / 5),
    }
    for mixes, often in zip(found.values(), (1, 1, 2, 1), strict=True):
        assert Counter(one for mix in mixes for one in mix) == dict.fromkeys(range(6), often)
    assert {frozenset(range(6)) - set(mix) for mix in found[4]} == {frozenset(mix) for mix in found[2]}


def test_there_is_no_share_of_nothing(bench, samples):
    samples.loc[samples["method"] == "adapter", "light"] = samples.loc[samples["method"] == "base", "light"].mean()
    found = bench("growth_parts.tables").Growth(samples, REWARDS, SDS, Bootstrap(resamples=100)).table()
    assert found.kept.isna().all()
    assert found.gain.notna().all()


def test_other_mixes_are_refused(bench, samples):
    growth_of = bench("growth_parts.tables").Growth
    with pytest.raises(ValueError, match="no setting of adapter with b"):
        growth_of(samples[samples["cell"] != 2], REWARDS, SDS)
    samples.loc[samples["cell"] == 4, "w_a"] = 0.7
    with pytest.raises(ValueError, match="equal weights at lambda 1"):
        growth_of(samples, REWARDS, SDS)


def test_result_files_hold_what_is_defined(bench, growth):
    figures = bench("growth").figures(growth, growth.table())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["mixes"]["2"] == ["a + b", "a + c", "b + c"]
    assert set(figures["by_method"]["drawn"]["2"]) == {"gain", "kept"}
    assert "difference" not in figures["by_method"]["mpa"]["2"]
    assert set(figures["by_reward"]["mpa"]["3"]) == set("abc")


def test_names_at_the_ends_of_lines_do_not_cover_each_other(bench, growth, monkeypatch):
    drawing = bench("growth_parts.figure")
    monkeypatch.setattr(drawing, "png", lambda figure: figure)
    figure = drawing.draw(growth.table())
    figure.draw_without_rendering()
    for axes, names in zip(figure.axes, (4, 3), strict=True):
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == names
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
