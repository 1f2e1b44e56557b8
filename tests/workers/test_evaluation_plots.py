"""The figures of an evaluation: what they mark, when they are left out, and whether they can be read."""

import warnings
from dataclasses import replace
from itertools import combinations

import evaluated
import pandas as pd
import pytest
from colours import contrast
from matplotlib.collections import PathCollection
from matplotlib.text import Text

from workers.evaluation import style
from workers.evaluation.placing import Label, place, settle
from workers.evaluation.plots import dial_png, shares_png
from workers.evaluation.plots_cost import cost_png, reward_kl_png
from workers.evaluation.plots_drift import drift_png
from workers.evaluation.plots_pareto import pareto_png
from workers.evaluation.plots_retraining import dial_retraining_png, measured_everywhere, retraining_png
from workers.evaluation.style import DARK, LIGHT, family, marker, new_figure

RIVALS = len(evaluated.METHODS) - 1  # all methods but the oracle


@pytest.fixture(scope="module")
def plain():
    return evaluated.analysed()


@pytest.fixture(scope="module")
def full():
    return evaluated.analysed(evaluated.WITH_ORACLES)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Figures of few pixels, which are drawn faster."""
    monkeypatch.setattr(style, "DPI", 50)


@pytest.fixture
def figure_of(monkeypatch):
    """The matplotlib figure behind a PNG, drawn without a warning."""

    def draw(function, *arguments):
        monkeypatch.setattr(f"{function.__module__}.png", lambda figure: figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = function(*arguments)
            figure.draw_without_rendering()
        return figure

    return draw


def points(axes):
    """How many points are marked."""
    return sum(len(part.get_offsets()) for part in axes.collections if isinstance(part, PathCollection))


def overlapping(axes):
    """Pairs of texts that cover each other, apart from the lines that lead to their points."""
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in axes.texts]
    return [(one, other) for (one, box), (other, second) in combinations(boxes, 2) if box.overlaps(second)]


def shown(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def test_figures_of_oracles_and_path_kl_are_left_out_without_them(plain):
    for draw in (retraining_png, dial_retraining_png, reward_kl_png):
        assert draw(plain) is None
    assert drift_png(None) is None
    assert drift_png(evaluated.comparison("not compared")) is None


def test_figures_of_shares_are_left_out_where_the_adapters_gain_nothing():
    nothing = evaluated.analysed(effects=evaluated.EFFECTS * 0, noise=0.5)
    assert cost_png(nothing) is None
    assert shares_png(nothing) is None


@pytest.mark.parametrize("draw", [pareto_png, shares_png, dial_png, cost_png])
def test_every_evaluation_has_its_first_figures_in_both_themes(plain, draw):
    light, dark = draw(plain, LIGHT), draw(plain, DARK)
    assert light[:8] == dark[:8] == b"\x89PNG\r\n\x1a\n"
    assert light[16:24] == dark[16:24]
    assert light != dark


def test_the_retraining_figure_has_a_panel_for_all_mixes_and_each_and_a_point_per_method(full, figure_of):
    panels = shown(figure_of(retraining_png, full))
    assert [axes.get_title(loc="left").replace("\n", " ") for axes in panels] == [
        "all 3 mixes",
        "brightness 50 % + colourfulness 50 %",
        "colourfulness 50 % + compressibility 50 %",
        "all 3 equally",
    ]
    assert [points(axes) for axes in panels] == [RIVALS] * 4
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    overall = full.rivals.set_index("method")["share_of_oracle"].drop("oracle")
    assert names[0].startswith(("Cached", "Blend"))
    assert names[-1] == "Best of 4"
    assert overall.idxmin() == "best_of_4"


def test_the_dial_is_drawn_against_what_was_retrained_at_its_strengths(full, figure_of):
    (axes,) = figure_of(dial_retraining_png, full).axes
    assert points(axes) == 2
    turned = next(line for line in axes.lines if line.get_label() == "turning the dial")
    assert list(turned.get_xdata()) == [0, 0.5, 1, 1.5]
    assert turned.get_ydata()[0] == 0


def test_the_cost_figure_names_every_method_once_and_no_name_covers_another(full, figure_of):
    figure = figure_of(cost_png, full)
    (axes,) = figure.axes
    assert points(axes) == len(evaluated.METHODS)
    assert len({text.get_text() for text in axes.texts}) == len(axes.texts) == len(evaluated.METHODS)
    assert not overlapping(axes)
    assert axes.get_xscale() == "linear"
    assert axes.get_ylabel() == "share of a retrained model's gain"


def test_costs_far_apart_are_drawn_on_a_logarithmic_axis(full, figure_of):
    rows = full.rivals["rows"].where(full.rivals["method"] != "best_of_4", 40 * 16)
    figure = figure_of(cost_png, replace(full, rivals=full.rivals.assign(rows=rows)))
    assert figure.axes[0].get_xscale() == "log"
    assert "640\n16×" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_without_oracles_the_cost_figure_shows_shares_of_the_adapters_gains(plain, figure_of):
    (axes,) = figure_of(cost_png, plain).axes
    assert points(axes) == len(evaluated.PLAIN.methods)
    assert axes.get_ylabel() == "share of the adapters' own gains"


def test_reward_against_kl_connects_the_strengths_of_a_mix_from_the_base(full, figure_of):
    panels = shown(figure_of(reward_kl_png, full))
    assert panels[0].get_title(loc="left") == "all 3 equally"
    table = full.summary[(full.summary[["w_brightness", "w_colourfulness", "w_compressibility"]] > 0).all(axis=1)]
    assert points(panels[0]) == len(table) + 1  # and the base
    swept = [list(line.get_ydata()) for line in panels[0].lines if len(line.get_xdata()) == 4]
    gains = table[table["method"] == "mpa"].sort_values("kl_lambda")["weighted_gain"]
    assert swept == [[0, *gains]]


def test_drift_marks_every_line_then_and_now_and_says_which_is_better(figure_of):
    figure = figure_of(drift_png, evaluated.comparison("improvement"))
    assert [points(axes) for axes in figure.axes] == [2 * len(evaluated.FRONTS), 4]
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {"▲ better"}
    worse = figure_of(drift_png, evaluated.comparison("regression", 0.9))
    assert {text.get_text() for axes in worse.axes for text in axes.texts} == {"▼ worse"}
    alike = figure_of(drift_png, evaluated.comparison("no clear difference", 1.001))
    assert not any(axes.texts for axes in alike.axes)


def test_lines_without_a_figure_are_not_drawn():
    comparison = evaluated.comparison("improvement")
    for line in (*comparison["fronts"], *comparison["methods"]):
        line["then"] = {"mean": None, "low": None, "high": None}
    assert drift_png(comparison) is None


def test_rivals_and_oracles_do_not_crowd_the_figures_of_the_blends(full, figure_of):
    legend = figure_of(shares_png, full).legends[0]
    names = {text.get_text() for text in legend.get_texts()}
    assert "Cached blend" in names
    assert not names & {"Best of 4", "LoRA Switch", "Retrained (oracle)"}
    names = {text.get_text() for text in figure_of(pareto_png, full).legends[0].get_texts()}
    assert "Retrained (oracle)" in names
    assert "Best of 4" not in names


def test_names_make_way_for_points_and_for_each_other():
    figure = new_figure(LIGHT, 4, 3)
    axes = figure.subplots()
    labels = [Label(f"method {index}", 1.0, 1.0 + 0.02 * index, 0.9, 1.2, LIGHT.ink) for index in range(5)]
    axes.scatter([1] * 5, [label.y for label in labels])
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 2)
    settle(figure)
    place(axes, labels, LIGHT)
    figure.draw_without_rendering()
    assert len(axes.texts) == 5
    assert not overlapping(axes)
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in map(Text.get_window_extent, axes.texts))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out_from_the_background(theme):
    assert min(contrast(theme.background, colour) for colour in (theme.ink, theme.muted)) >= 4.5
    assert min(contrast(theme.background, colour) for colour in (*theme.methods.values(), *theme.series)) >= 3


def test_every_method_has_a_marker_of_its_own():
    markers = {method: marker(method) for method in evaluated.METHODS}
    assert len(set(markers.values())) == len(markers)
    assert marker("best_of_16") == marker("best_of_4")
    assert [family(name) for name in ("code_4_5", "rgg_2.5", "mpa")] == ["code", "rgg", "mpa"]


def test_a_method_measured_at_fewer_mixes_has_no_place_over_all():
    rivals = pd.DataFrame({"method": ["mpa", "rgg_2", "oracle"], "preferences": [5, 1, 5]})
    assert list(measured_everywhere(rivals)["method"]) == ["mpa", "oracle"]
