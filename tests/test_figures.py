"""Several benchmarks may fill one result file, each its own figures."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def merge_part():
    path = Path(__file__).parent / "bench" / "figures.py"
    spec = importlib.util.spec_from_file_location("bench_figures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.merge_part


def origin(script):
    return {"command": f"python tests/bench/{script}.py", "date": "2026-01-01", "hardware": "a machine"}


def test_a_script_replaces_its_own_figures_and_keeps_the_others(merge_part):
    facts = merge_part({}, "speed", origin("speed"), {"ratio": 1.0, "dropped": 2.0})
    facts = merge_part(facts, "fidelity", origin("fidelity"), {"modes": {"ls": 1}})
    facts = merge_part(facts, "speed", origin("speed"), {"ratio": 3.0})
    assert facts["figures"] == {"ratio": 3.0, "modes": {"ls": 1}}
    assert facts["command"] == origin("speed")["command"]
    assert facts["parts"]["fidelity"] == {**origin("fidelity"), "keys": ["modes"]}
    assert facts["parts"]["speed"]["keys"] == ["ratio"]


def test_a_figure_has_one_script(merge_part):
    facts = merge_part({}, "speed", origin("speed"), {"ratio": 1.0})
    with pytest.raises(ValueError, match=r"ratio: written by speed\.py"):
        merge_part(facts, "fidelity", origin("fidelity"), {"ratio": 2.0})
    facts = {"figures": {"older": 1}}  # a file written before there were parts
    assert merge_part(facts, "speed", origin("speed"), {"ratio": 1.0})["figures"] == {"older": 1, "ratio": 1.0}
