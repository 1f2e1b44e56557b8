"""Run files and grids: what is measured, each distinct thing once, and what is refused before any work."""

from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infra
from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.grid import ADAPTER, BASE, Cell, plan_cells

RUNS = Path(infra.__file__).parent / "runs"
BASIS = ("warm", "small")
THREE = ("a", "b", "c")


def cells_of(basis=BASIS, **values):
    return plan_cells(EvaluateConfig(prompts=("x",), **values), basis)


def count(cells, method):
    return sum(cell.method == method for cell in cells)


def test_base_comes_first_and_then_each_adapter():
    assert cells_of()[:3] == [
        Cell(BASE, (0.0, 0.0), 0.0),
        Cell(ADAPTER, (1.0, 0.0), 1.0),
        Cell(ADAPTER, (0.0, 1.0), 1.0),
    ]


def test_equal_work_is_planned_once():
    cells = cells_of(kl_lambdas=(0.0, 0.5, 1.0), kl_methods=("mpa", "ls", "soup"), pair_weights=(0.0, 0.5, 1.0))
    assert len(set(cells)) == len(cells)
    assert count(cells, BASE) == 1
    assert count(cells, ADAPTER) == 2
    assert not [cell for cell in cells if cell.kl_lambda == 0 and cell.method != BASE]
    assert not [cell for cell in cells if max(cell.weights) == 1 and cell.kl_lambda == 1 and cell.method != ADAPTER]


def test_a_tenth_and_nine_tenths_the_other_way_round_are_one_preference():
    cells = cells_of(methods=("mpa",), pair_weights=(0.8,), weights=({"warm": 0.8, "small": 1 - 0.8},))
    assert [cell.weights for cell in cells if cell.method == "mpa"] == [(0.8, 0.2), (0.5, 0.5)]


def test_each_pair_gets_each_weight_and_all_get_equal_weights():
    cells = cells_of(THREE, methods=("mpa",), pair_weights=(0.2, 0.5))
    pairs = [cell for cell in cells if cell.method == "mpa" and len(cell.active) == 2]
    assert len(pairs) == 2 * len(list(combinations(THREE, 2)))
    assert [cell for cell in cells if len(cell.active) == 3] == [Cell("mpa", (0.333333333,) * 3, 1.0)]
    without = cells_of(THREE, methods=("mpa",), pair_weights=(0.2, 0.5), equal_weights=False)
    assert [cell for cell in cells if cell not in without] == [Cell("mpa", (0.333333333,) * 3, 1.0)]


def test_the_simplex_is_covered_in_steps():
    cells = cells_of(THREE, methods=("soup",), pair_weights=(), simplex_steps=4)
    found = {cell.weights for cell in cells if cell.method == "soup" and len(cell.active) == 3}
    assert (0.5, 0.25, 0.25) in found
    assert len([cell for cell in cells if cell.method == "soup" and 0.25 in cell.weights]) == 3 * 2 + 3


def test_ls_does_not_extrapolate_and_the_others_do():
    cells = cells_of(kl_lambdas=(0.5, 1.5), kl_methods=("mpa", "ls", "soup"))
    strengths = {
        method: {cell.kl_lambda for cell in cells if cell.method == method} for method in ("mpa", "ls", "soup")
    }
    assert strengths == {"mpa": {0.5, 1.0, 1.5}, "ls": {0.5, 1.0}, "soup": {0.5, 1.0, 1.5}}


def test_the_dial_is_turned_at_equal_weights_and_single_adapters_unless_everywhere():
    few = cells_of(methods=("mpa",), kl_lambdas=(0.5,))
    turned = {cell.weights for cell in few if cell.kl_lambda == 0.5}
    assert turned == {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    more = cells_of(methods=("mpa",), kl_lambdas=(0.5,), kl_everywhere=True)
    assert {cell.weights for cell in more if cell.kl_lambda == 0.5} == turned | {(0.2, 0.8), (0.8, 0.2)}
    none = cells_of(methods=("mpa",), kl_lambdas=(0.5,), kl_methods=())
    assert {cell.kl_lambda for cell in none} == {0.0, 1.0}


def test_one_adapter_alone_can_be_evaluated():
    assert cells_of(("only",), kl_lambdas=(0.5,)) == [
        Cell(BASE, (0.0,), 0.0),
        Cell(ADAPTER, (1.0,), 1.0),
        Cell("mpa", (1.0,), 0.5),
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.floats(0, 1), max_size=3))
def test_every_planned_preference_is_valid(count, steps, shares):
    basis = THREE[:count] if count < 4 else (*THREE, "d")
    for cell in cells_of(basis, simplex_steps=steps, pair_weights=tuple(shares), kl_lambdas=(0.0, 1.5)):
        preference = cell.preference(basis)
        assert sum(preference.coefficients(basis)) == pytest.approx(1, abs=1e-6)


def test_seeds_may_be_a_number():
    assert EvaluateConfig(prompts=("x",), seeds=3).seeds == (0, 1, 2)


def test_prompts_come_from_a_list_a_file_beside_the_run_or_the_sprites(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n two \nthree\n")
    run = tmp_path / "run.toml"
    run.write_text('prompts = "prompts.txt"\nnum_prompts = 2\n')
    assert EvaluateConfig.from_toml(run).read_prompts() == ("one", "two")
    assert EvaluateConfig(prompts=("x", "y")).read_prompts() == ("x", "y")
    assert len(EvaluateConfig(num_prompts=5).read_prompts()) == 5
    assert len(EvaluateConfig().read_prompts()) == 24


def test_prompts_seeds_and_weights_come_from_pandas():
    prompts = pd.DataFrame({"prompt": ["A red colored car.", "A blue colored cup."], "kind": ["one", "one"]})
    weights = pd.DataFrame({"warm": [0.25, 0.5], "small": [0.75, 0.5]})
    config = EvaluateConfig(prompts=prompts["prompt"], seeds=pd.Series([4, 7]), weights=weights)
    assert config == EvaluateConfig(
        prompts=("A red colored car.", "A blue colored cup."),
        seeds=(4, 7),
        weights=({"warm": 0.25, "small": 0.75}, {"warm": 0.5, "small": 0.5}),
    )
    assert all(type(seed) is int for seed in config.seeds)
    with pytest.raises(EvaluationError, match="prompts"):
        EvaluateConfig.parse({"prompts": prompts})


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("sedes = 3", "sedes", "unknown key 'sedes'; known keys: bundle"),
        ('methods = ["mpa", "best"]', "methods", "unknown method 'best'; choose from mpa, ls, soup, cached, staged"),
        ('rewards = ["beauty"]', "rewards", "unknown reward 'beauty'; choose one of colourfulness"),
        ("seeds = []", "seeds", "one or more different numbers"),
        ("seeds = 0", "seeds", "one or more different numbers"),
        ("seeds = [1, 1]", "seeds", "one or more different numbers"),
        ("num_inference_steps = 0", "num_inference_steps", "greater than or equal to 1"),
        ("pair_weights = [1.2]", "pair_weights", r"must all lie in \[0, 1\]"),
        ("confidence = 1.0", "confidence", "less than 1"),
        ("bundle = 7", "bundle", "bundle = 7"),
    ],
)
def test_a_wrong_key_is_named_with_what_it_may_hold(tmp_path, text, key, words):
    run = tmp_path / "run.toml"
    run.write_text(text)
    with pytest.raises(EvaluationError, match=words) as caught:
        EvaluateConfig.from_toml(run)
    assert caught.value.key == key
    assert str(run) in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("seeds = ", "no readable TOML"), (None, "no run file")])
def test_an_unreadable_run_file_is_one_clear_error(tmp_path, text, words):
    run = tmp_path / "run.toml"
    if text is not None:
        run.write_text(text)
    with pytest.raises(EvaluationError, match=words):
        EvaluateConfig.from_toml(run)


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"weights": ({"warm": 1.0, "huge": 0.0},)}, "weights[0]", "unknown basis name 'huge'"),
        ({"weights": ({"warm": 0.7},)}, "weights[0]", "sum to 0.7"),
        ({"weights": ({"warm": 1.5, "small": -0.5},)}, "weights[0]", "small is -0.5"),
        ({"kl_lambdas": (9.0,)}, "kl_lambdas", "kl_lambda is 9"),
        ({"kl_lambdas": (float("nan"),)}, "kl_lambdas", "kl_lambda is nan"),
    ],
)
def test_what_the_basis_cannot_serve_is_refused_by_key(values, key, words):
    with pytest.raises(EvaluationError, match=words) as caught:
        cells_of(**values)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ((), "at least one prompt"),
        (("x", " "), "none of them empty"),
        (("x", "x"), "once"),
        ("missing.txt", "cannot be read"),
    ],
)
def test_bad_prompts_are_refused(prompts, words):
    with pytest.raises(EvaluationError, match=words):
        EvaluateConfig(prompts=prompts).read_prompts()


@pytest.mark.parametrize("path", sorted(RUNS.glob("evaluate_*.toml")), ids=lambda path: path.stem)
def test_shipped_run_files_plan_a_grid(path):
    config = EvaluateConfig.from_toml(path)
    assert len(plan_cells(config, THREE)) > 10
    assert config.read_prompts()
