"""An evaluation beside an earlier one: hand-made summaries whose comparison is known."""

import copy
from typing import Any

import pytest

from infra.comparing import changes, compare, rows, verdict_of
from infra.manifests import BundleDefaults

Summary = dict[str, Any]
FACTS = {
    "bundle": "sprites@1",
    "bundle_digest": "b" * 64,
    "digest": "d" * 64,
    "date": "2026-11-23 12:00 UTC",
    "adapters": {"warm": "warmth", "small": "compressibility"},
    "rewards": {"warmth": "1", "compressibility": "1"},
}


def cell(method: str, warm: float, *, kl_lambda: float = 1.0, warmth: float = 3.0, cost: float = 80.0) -> Summary:
    rewards = {"warmth": warmth, "warmth_low": warmth - 1, "warmth_high": warmth + 1}
    rewards |= {"compressibility": 2.0, "compressibility_low": 1.0, "compressibility_high": 3.0}
    weights = {"w_warm": warm, "w_small": round(1 - warm, 9)} if method != "base" else {"w_warm": 0.0, "w_small": 0.0}
    return {"method": method, **weights, "kl_lambda": kl_lambda, "rows": cost, "seconds": cost / 100, **rewards}


def front(name: str, value: float | None, width: float = 1.0) -> Summary:
    bounds = (None, None) if value is None else (value - width, value + width)
    return {
        "front": name,
        **dict(zip(("hypervolume_low", "hypervolume_high"), bounds, strict=True)),
        "hypervolume": value,
    }


def summary(reach: float | None = 9.0, share: float | None = 0.6, **facts: Any) -> Summary:
    bounds = (None, None) if share is None else (share - 0.05, share + 0.05)
    method = {"method": "mpa", "share": share, "share_low": bounds[0], "share_high": bounds[1]}
    return {
        "facts": FACTS | facts,
        "config": {"methods": ["mpa"]},
        "cells": [cell("base", 0, kl_lambda=0.0), cell("adapter", 1), cell("adapter", 0), cell("mpa", 0.5)],
        "methods": [method],
        "hypervolumes": [front("base", 4.0), front("adapters alone", 6.0), front("mpa", reach)],
    }


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        ((5, 4, 6), (7, 6, 8), "better"),
        ((5, 4, 6), (3, 2, 4), "worse"),
        ((5, 4, 6), (5, 4, 6), "no clear difference"),
        ((5, 4, 6), (6, 5.5, 6.5), "no clear difference"),
        ((5, 4, 6), (6.1, 4.9, 7), "no clear difference"),
        ((5, 2, 8), (7.9, 7.8, 8), "no clear difference"),
        # less is asked for worse than for better
        ((7.9, 7.8, 8), (5, 2, 8), "worse"),
        ((6.1, 4.9, 7), (5, 4, 6), "no clear difference"),
        ((5, 4, 6), (None, None, None), "not known"),
        ((None, None, None), (5, 4, 6), "not known"),
    ],
)
def test_the_new_mean_lies_outside_of_the_old_interval_and_for_better_the_old_mean_outside_of_the_new_one(
    then, now, verdict
):
    old, new = (dict(zip(("mean", "low", "high"), figures, strict=True)) for figures in (then, now))
    assert verdict_of(old, new) == verdict


@pytest.mark.parametrize(
    ("reach", "share", "verdict", "words"),
    [
        (9.0, 0.6, "no clear difference", "No hypervolume and no share of the adapters' gains differs clearly."),
        (12.0, 0.6, "improvement", "Better: hypervolume of mpa, 12 (11 to 13) after 9 (8 to 10)."),
        (7.0, 0.6, "regression", "Worse: hypervolume of mpa, 7 (6 to 8) after 9 (8 to 10)."),
        (9.0, 0.5, "no clear difference", "Worse: share of the gain, mpa, 50 % (45 to 55) after 60 % (55 to 65)."),
        (9.0, 0.5, "no clear difference", "The verdict rests on the hypervolumes"),
        (12.0, 0.5, "improvement", "Better: hypervolume of mpa, 12 (11 to 13) after 9 (8 to 10)."),
        (None, 0.6, "no clear difference", "No hypervolume and no share"),
    ],
)
def test_one_worse_front_is_a_regression_and_lines_are_told_with_their_figures(reach, share, verdict, words):
    now = summary(reach, share, bundle="sprites@2", digest="e" * 64)
    found = compare(now, summary(), "the champion", ["adapter warm: a@1 became a@2"])
    assert found["verdict"] == verdict
    assert any(sentence.startswith(words) for sentence in found["sentences"])
    assert found["sentences"][0].startswith("Compared with sprites@1, the champion (evaluation dddddddddddd of 2026-")
    assert (found["against"]["role"], found["now"]["bundle"]) == ("the champion", "sprites@2")
    assert found["changed"] == ["adapter warm: a@1 became a@2"]


def test_lines_carry_figures_changes_and_costs():
    now = summary(12.0, 0.6)
    now["cells"][-1] = cell("mpa", 0.5, warmth=8.0, cost=40.0)
    found = compare(now, summary())
    assert [line["front"] for line in found["fronts"]] == ["adapters alone", "mpa"]
    [alone, mpa] = found["fronts"]
    assert (alone["change"], alone["verdict"]) == (0.0, "no clear difference")
    assert (mpa["then"], mpa["now"]) == (
        {"mean": 9.0, "low": 8.0, "high": 10.0},
        {"mean": 12.0, "low": 11.0, "high": 13.0},
    )
    [method] = found["methods"]
    assert method["rows"] == {"then": 80.0, "now": 40.0}
    assert method["seconds"] == {"then": 0.8, "now": 0.4}
    blend = found["cells"][-1]
    assert (blend["method"], blend["weights"], blend["kl_lambda"]) == ("mpa", {"small": 0.5, "warm": 0.5}, 1.0)
    assert blend["rewards"]["warmth"]["verdict"] == "better"
    assert blend["rewards"]["compressibility"]["change"] == 0.0
    assert rows(found)[1] == {
        "what": "hypervolume of mpa",
        "then": "9 (8 to 10)",
        "now": "12 (11 to 13)",
        "change": "+3",
        "verdict": "better",
    }
    assert rows(found)[-1]["change"] == "+0 points"


def test_seconds_that_hold_the_measuring_of_path_kl_are_no_cost():
    [method] = compare(summary(path_kl=True), summary())["methods"]
    assert method["seconds"] == {"then": 0.8, "now": None}
    assert method["rows"] == {"then": 80.0, "now": 80.0}


def test_cells_alone_are_no_regression():
    now = summary()
    now["cells"][-1] = cell("mpa", 0.5, warmth=-9.0)
    found = compare(now, summary())
    assert found["cells"][-1]["rewards"]["warmth"]["verdict"] == "worse"
    assert found["verdict"] == "no clear difference"


def test_without_an_earlier_one_nothing_is_compared():
    found = compare(summary(), None)
    assert (found["verdict"], found["against"], found["changed"]) == ("not compared", None, [])
    assert found["fronts"] == found["methods"] == found["cells"] == rows(found) == []
    assert found["sentences"] == ["Not compared: no earlier evaluation of a champion of sprites asked the same."]


def test_a_front_over_other_mixes_is_left_out():
    more = summary(12.0)
    more["cells"].append(cell("mpa", 0.2))
    found = compare(more, summary())
    assert [line["front"] for line in found["fronts"]] == ["adapters alone"]
    assert found["methods"] == []
    assert len(found["cells"]) == 4
    dial = summary(12.0)
    dial["cells"].append(cell("mpa", 0.5, kl_lambda=1.5))
    assert [line["front"] for line in compare(dial, summary())["fronts"]] == ["adapters alone", "mpa"]


def test_other_names_of_adapters_leave_nothing_to_compare():
    renamed = summary(1.0)
    for one in renamed["cells"]:
        one["w_vivid"] = one.pop("w_warm")
    assert compare(renamed, summary())["verdict"] == "not compared"


def test_oracles_and_rivals_are_not_held_against_a_bundle():
    then, now = summary(), summary()
    for name, values in (("oracle", (9.0, 5.0)), ("best_of_4", (9.0, 5.0))):
        for document, value in zip((then, now), values, strict=True):
            document["cells"].append(cell(name, 0.5))
            document["hypervolumes"].append(front(name, value))
    found = compare(now, then)
    assert found["verdict"] == "no clear difference"
    assert {line["method"] for line in found["cells"]} == {"base", "adapter", "mpa", "oracle", "best_of_4"}


def test_summaries_are_left_as_they_are():
    then, now = summary(), summary(12.0)
    before = copy.deepcopy((then, now))
    compare(now, then)
    assert (then, now) == before


def test_changes_name_adapters_and_defaults(registry, publish):
    first, second = (publish(registry, seed) for seed in range(2))
    old = registry.publish_bundle("sprites", first.base, {"bright": first, "dim": first})
    new = registry.publish_bundle(
        "sprites",
        first.base,
        {"bright": second, "warm": first},
        defaults=BundleDefaults(guidance_scale=2.0, num_inference_steps=old.defaults.num_inference_steps),
    )
    assert changes(old, old) == []
    assert changes(old, new) == [
        f"adapter bright: {first.ref} became {second.ref}",
        f"adapter dim: {first.ref} became none",
        f"adapter warm: none became {first.ref}",
        f"default guidance_scale: {old.defaults.guidance_scale} became 2.0",
    ]
