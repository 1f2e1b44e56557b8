"""The gate before a promotion, recommended ranges, and the tree of what came from what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.comparing import REGRESSION, common_fronts, compare, short
from infra.errors import AliasMovedError, IntegrityError, RegistryError
from infra.evaluations import (
    Evaluation,
    PromotionError,
    check_promotion,
    comparable,
    evaluations_behind,
    evaluations_of,
)
from infra.kl_budget import kl_difference
from infra.lineage import Node, lineage
from infra.manifests import AdapterFacts, AdapterRecord, BundleRecord, Metric, Range
from infra.recommending import lambda_range, weight_ranges
from infra.registry import Registry

Publish = Callable[..., AdapterRecord]
FACTS = {
    "base": "sprites",
    "rewards": {"bright": "1"},
    "prompts": ["A red colored car."],
    "seeds": [0],
    "steps": 20,
    "guidance": 3.0,
    "eta": 1.0,
    "date": "2026-11-23 12:00 UTC",
    "adapters": {"bright": "brightness"},
}


def evaluate(
    registry: Registry,
    bundle: BundleRecord,
    digest: str,
    reach: tuple[float, float, float],
    share: float = 0.6,
    **facts: Any,
) -> None:
    """Store a finished evaluation whose mpa front has this hypervolume, from low to high, and keeps this share."""
    low, value, high = reach
    front = {"hypervolume": value, "hypervolume_low": low, "hypervolume_high": high}
    summary = {
        "facts": FACTS | facts,
        "headline": ["All is well."],
        "cells": [],
        "methods": [{"method": "mpa", "share": share, "share_low": share - 0.05, "share_high": share + 0.05}],
        "hypervolumes": [{"front": "base"} | dict.fromkeys(front, 0.0), {"front": "mpa"} | front],
    }
    registry.store.create(f"evaluations/{bundle.digest}/{digest * 64}/summary.json", json.dumps(summary).encode())


@pytest.fixture
def bundles(registry: Registry, publish: Publish) -> list[BundleRecord]:
    """Two versions of a bundle, of different adapters; the first is the champion."""
    records = [publish(registry, seed) for seed in range(2)]
    made = [registry.publish_bundle("sprites", record.base, {"bright": record}) for record in records]
    registry.promote("sprites", 1, actor="tests", reason="first")
    return made


def test_the_gate_wants_an_evaluation_of_the_bundle_and_a_comparable_one_of_the_champion(
    registry: Registry, bundles: list[BundleRecord]
):
    champion, bundle = bundles
    with pytest.raises(PromotionError, match=r"sprites@2 was never evaluated: first run .* --bundle sprites@2"):
        check_promotion(registry, bundle, champion)
    evaluate(registry, bundle, "a", (8.0, 9.0, 10.0))
    assert "no other champion" in check_promotion(registry, bundle, None)
    with pytest.raises(PromotionError, match=r"has no evaluation 'b'; it has: aaaaaaaaaaaa"):
        check_promotion(registry, bundle, champion, "b")
    evaluate(registry, champion, "c", (8.0, 9.0, 10.0), steps=50)
    with pytest.raises(PromotionError, match=r"no evaluation of the champion sprites@1 asks what"):
        check_promotion(registry, bundle, champion)
    evaluate(registry, champion, "d", (8.0, 9.0, 10.0))
    assert "mpa reaches a hypervolume of 9, the champion sprites@1 9 (8 to 10)" in check_promotion(
        registry, bundle, champion, "aaa"
    )


@pytest.mark.parametrize(("value", "passes"), [(7.9, False), (8.0, True), (12.0, True)])
def test_the_gate_closes_below_the_champions_interval(
    registry: Registry, bundles: list[BundleRecord], value: float, passes: bool
):
    champion, bundle = bundles
    evaluate(registry, champion, "a", (8.0, 9.0, 10.0))
    evaluate(registry, bundle, "b", (value - 1, value, value + 1))
    if passes:
        assert check_promotion(registry, bundle, champion)
    else:
        with pytest.raises(PromotionError, match=r"sprites@2 is worse: mpa reaches .* 7\.9, .* 9 \(8 to 10\)"):
            check_promotion(registry, bundle, champion)


@pytest.mark.parametrize("reach", [(6.9, 7.9, 8.9), (6.0, 7.9, 9.5), (7.0, 8.0, 9.0), (11.0, 12.0, 13.0)])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_a_comparison_calls_a_regression_does_not_pass_and_nothing_else(
    registry: Registry, bundles: list[BundleRecord], reach: tuple[float, float, float], share: float
):
    champion, bundle = bundles
    evaluate(registry, champion, "a", (8.0, 9.0, 10.0), share=0.6)
    evaluate(registry, bundle, "b", reach, share=share)
    now, then = (evaluations_of(registry.store, one)[0].summary for one in (bundle, champion))
    if compare(now, then)["verdict"] == REGRESSION:
        assert reach[1] < 8.0
        with pytest.raises(PromotionError, match="sprites@2 is worse"):
            check_promotion(registry, bundle, champion)
    else:
        assert check_promotion(registry, bundle, champion)


def test_unfinished_evaluations_do_not_exist_and_damaged_ones_are_named(
    registry: Registry, bundles: list[BundleRecord]
):
    _, bundle = bundles
    folder = f"evaluations/{bundle.digest}"
    registry.store.create(f"{folder}/{'a' * 64}/samples.parquet", b"cut")
    assert evaluations_of(registry.store, bundle) == []
    registry.store.create(f"{folder}/{'b' * 64}/summary.json", b"{")
    with pytest.raises(IntegrityError, match=r"bbb/summary\.json is damaged: delete the folder"):
        evaluations_of(registry.store, bundle)


def test_a_child_with_the_same_adapters_keeps_its_parents_evaluations(
    registry: Registry, bundles: list[BundleRecord], publish: Publish
):
    _, bundle = bundles
    evaluate(registry, bundle, "a", (8.0, 9.0, 10.0))
    adapters = registry.adapters_of(bundle)
    child = registry.publish_bundle(
        "sprites", bundle.base, adapters, parent=bundle.ref, lambda_range=Range(low=0, high=1)
    )
    other = registry.publish_bundle("sprites", bundle.base, {"bright": publish(registry, 5)}, parent=bundle.ref)
    assert [one.short for one in evaluations_behind(registry, child)] == ["a" * 12]
    assert evaluations_behind(registry, other) == []


def cell(w: float, reward: float, other: float, *, kl_lambda: float = 1.0, **changes: Any) -> dict[str, Any]:
    rewards = {"brightness": reward, "warmth": other}
    weights = {"w_bright": w, "w_warm": round(1 - w, 9)}
    gain = {"weighted_gain": 1.0, "weighted_gain_low": 0.9, "weighted_gain_high": 1.1}
    return rewards | weights | gain | {"method": "mpa", "kl_lambda": kl_lambda, "diversity": 1.0} | changes


def test_ranges_are_those_of_mixes_that_nothing_beats():
    facts = {"adapters": {"bright": "brightness", "warm": "warmth"}, "rewards": {"brightness": "1", "warmth": "1"}}
    base = cell(0, 0, 0, kl_lambda=0.0, method="base", weighted_gain=None)
    cells = [
        base,
        cell(1.0, 3, 0, method="adapter"),
        cell(0.0, 0, 3, method="adapter"),
        cell(0.8, 3.5, 1),
        cell(0.5, 2, 2),
        cell(0.2, 0, 1),
    ]
    summary = {"facts": facts, "cells": cells}
    # the adapter of weight 1 is beaten by the mix of .8, the mix of .2 by that of .5
    assert weight_ranges(summary, "mpa") == {"bright": Range(low=0.0, high=0.8), "warm": Range(low=0.2, high=1.0)}
    with pytest.raises(RegistryError, match=r"no mix of method 'ls', it measured: adapter, base, mpa"):
        weight_ranges(summary, "ls")
    assert lambda_range(summary, "mpa") == Range(low=0.0, high=1.0)
    rising = cell(0.5, 2, 2, kl_lambda=1.5, weighted_gain_high=1.4)
    assert lambda_range({"facts": facts, "cells": [*cells, rising]}, "mpa").high == 1.5
    falling = rising | {"weighted_gain_high": 0.5}
    assert lambda_range({"facts": facts, "cells": [*cells, falling]}, "mpa").high == 1.0
    uniform = rising | {"diversity": 0.4}
    assert lambda_range({"facts": facts, "cells": [*cells, uniform]}, "mpa").high == 1.0


def test_clearly_different_kl_is_told_with_its_figures(registry: Registry, publish: Publish):
    record = publish(registry)

    def trained(path_kl: float | None, kl_weight: float | None = 0.1) -> AdapterRecord:
        metrics = {} if path_kl is None else {"path_kl": Metric(value=path_kl)}
        return record.model_copy(update={"metrics": metrics, "kl_weight": kl_weight})

    assert kl_difference({"a": trained(100), "b": trained(190)}) is None
    assert "path KL: a 100 nats, b 250 nats" in (kl_difference({"a": trained(100), "b": trained(250)}) or "")
    assert kl_difference({"a": trained(None, 0.1), "b": trained(250, 0.15)}) is None
    assert "KL weight: a 0.1, b 0.3" in (kl_difference({"a": trained(None, 0.1), "b": trained(250, 0.3)}) or "")
    assert "nothing is known of the KL of b" in (kl_difference({"a": trained(100), "b": trained(None, None)}) or "")


def test_lineage_leads_from_the_base_to_evaluations(registry: Registry, bundles: list[BundleRecord]):
    champion, bundle = bundles
    evaluate(registry, champion, "a", (8.0, 9.0, 10.0))

    def flat(node: Node, depth: int = 0) -> list[tuple[int, str, bool]]:
        return [(depth, node.text, node.chosen)] + [line for one in node.children for line in flat(one, depth + 1)]

    root = flat(lineage(registry, champion))
    words = ("base sprites (hash", "run unnamed: KL weight 0.1, seed 0", "adapter colour@1: colourfulness, rank 2")
    words += ("bundle sprites@1 (champion)", "evaluation aaaaaaaaaaaa of 2026-11-23 12:00 UTC: All is well.")
    assert [depth for depth, _, _ in root] == [0, 1, 2, 3, 4]
    assert all(text.startswith(word) for (_, text, _), word in zip(root, words, strict=True))
    assert [chosen for _, _, chosen in root] == [False, False, False, True, False]
    adapter = registry.adapters_of(bundle)["bright"]
    assert [text for _, text, chosen in flat(lineage(registry, adapter)) if chosen] == [
        "adapter colour@2: colourfulness, rank 2"
    ]
    assert "bundle sprites@2" in flat(lineage(registry, adapter))[-1][1]


def test_a_tag_is_set_once(registry: Registry, bundles: list[BundleRecord]):
    tagged = registry.tag("sprites", 1, "release-1", actor="me", reason="shipped")
    assert registry.tag("sprites", 1, "release-1", actor="you", reason="again") == tagged
    with pytest.raises(AliasMovedError, match="sprites@release-1 is taken, and tags do not move"):
        registry.tag("sprites", 2, "release-1", actor="me", reason="shipped")
    assert registry.get("sprites@release-1") == bundles[0]


def test_an_adapter_of_unknown_training_is_a_newer_schema_and_others_stay_as_they_were(
    registry: Registry, publish: Publish, adapter_dir: Callable[..., Path], facts: AdapterFacts
):
    assert publish(registry).schema_version == 1
    unknown = registry.publish_adapter(
        "import", adapter_dir(), facts.model_copy(update={"kl_weight": None, "seed": None})
    )
    assert unknown.schema_version == 2
    assert registry.get_adapter("import") == unknown


def test_only_evaluations_in_the_same_deviations_are_compared():
    def counted(sd: float) -> Evaluation:
        return Evaluation("a", "", {"facts": FACTS, "hypervolumes": [], "scales": {"bright": {"mean": 0.5, "sd": sd}}})

    assert comparable(counted(0.1), counted(0.100001))
    assert not comparable(counted(0.1), counted(0.11))


def test_rivals_and_retrained_models_are_not_part_of_the_bundle():
    fronts = [{"front": name, "hypervolume": 1.0} for name in ("base", "mpa", "mpa, any lambda", "oracle", "code_20_5")]
    summary = {"facts": FACTS, "config": {"methods": ["mpa"]}, "hypervolumes": fronts}
    assert [line["front"] for line in common_fronts(summary, summary)] == ["mpa", "mpa, any lambda"]


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (None, "", "not known"),
        (0.0123, "", "0.0123"),
        (999.4, "", "999"),
        (999.6, "", "1,000"),
        (-1234.5, "+", "-1,234"),
        (2e4, "+", "+20,000"),
    ],
)
def test_large_figures_are_not_in_powers_of_ten(value: float | None, sign: str, text: str):
    assert short(value, sign) == text
