"""evaluate-blend beside a champion: the verdict, who becomes champion, and what Prefect is told."""

import json
import shutil
from pathlib import Path

import pytest
from prefect_events import wait_for_event
from tiny_evaluation import RUN

from infra.manifests import BundleDefaults
from infra.registry import Registry
from infra.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("coarse_figures")]


@pytest.fixture(scope="module")
def evaluated(prefect, rivals_store_url, tmp_path_factory):
    """A store with the bundle rivals@1 and its evaluation, and what the flow said of it."""
    from flows.evaluate_blend import evaluate_blend

    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(rivals_store_url.removeprefix("file://"), root / "store")
    url = f"file://{root / 'store'}"
    return url, evaluate_blend(RUN, store_url=url, output_dir=str(root / "out"))


@pytest.fixture
def beside(evaluated, tmp_path, request):
    """A copy of the store whose champion rivals@2 was evaluated alike, with so many times the hypervolumes."""
    shutil.copytree(evaluated[0].removeprefix("file://"), tmp_path / "store")
    registry = Registry(open_store(f"file://{tmp_path / 'store'}"))
    mine = registry.get_bundle("rivals@1")
    other = BundleDefaults(guidance_scale=3.0, num_inference_steps=4)
    champion = registry.publish_bundle("rivals", mine.base, registry.adapters_of(mine), defaults=other)
    registry.promote("rivals", champion.version, actor="tests", reason="first")
    summary = json.loads((Path(evaluated[1]["report"]).parent / "summary.json").read_text())
    summary["facts"] |= {"bundle": champion.ref, "bundle_digest": champion.digest, "digest": "f" * 64}
    for row in summary["hypervolumes"]:
        row["hypervolume"] *= request.param
        row |= {"hypervolume_low": row["hypervolume"] * 0.99, "hypervolume_high": row["hypervolume"] * 1.01}
    path = f"evaluations/{champion.digest}/{'f' * 64}/summary.json"
    registry.store.create(path, json.dumps(summary).encode())
    return registry


def evaluate(registry, tmp_path, **options):
    from flows.evaluate_blend import evaluate_blend

    return evaluate_blend(RUN, store_url=registry.store.url, output_dir=str(tmp_path / "out"), **options)


def told(event, answer):
    """The event about this evaluation."""
    from prefect.settings import PREFECT_API_URL

    return wait_for_event(PREFECT_API_URL.value(), event, location=answer["location"])


def artifact(key):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.request("GET", f"/artifacts/{key}/latest").json()["data"]


def test_the_first_evaluation_is_compared_with_nothing(evaluated):
    _, answer = evaluated
    assert (answer["bundle"], answer["verdict"], answer["promotion"]) == ("rivals@1", "not compared", None)
    assert answer["comparison"]["against"] is None
    event = told("diffusion-blend.evaluation.finished", answer)
    assert event["resource"]["prefect.resource.id"] == "diffusion-blend.bundle.rivals"
    assert any(one["prefect.resource.id"].startswith("prefect.flow-run.") for one in event["related"])


@pytest.mark.parametrize("beside", [9.0], indirect=True)
def test_a_better_champion_makes_a_regression_that_is_told_with_its_figures(beside, tmp_path):
    answer = evaluate(beside, tmp_path, promote=True)
    assert answer["verdict"] == "regression"
    assert answer["comparison"]["against"]["bundle"] == "rivals@2"
    assert "hypervolume of mpa" in {line["what"] for line in answer["comparison"]["worse"]}
    assert answer["promotion"]["promoted"] is False
    assert "rivals@1 is worse" in answer["promotion"]["reason"]
    assert beside.get_bundle("rivals@champion").version == 2
    event = told("diffusion-blend.evaluation.regressed", answer)
    assert event["payload"]["comparison"] == answer["comparison"]
    assert "Worse: hypervolume of " in event["payload"]["text"]
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (comparison["verdict"], comparison["changed"]) == (
        "regression",
        ["default guidance_scale: 3.0 became 2.0"],
    )
    assert not any(path.endswith("comparison.json") for path in beside.store.list("evaluations"))
    text = artifact("evaluate-rivals-report")
    assert "## Against rivals@2: regression" in text
    assert "**Not promoted:** rivals@1 is worse" in text
    assert "- default guidance_scale: 3.0 became 2.0" in text
    assert "| hypervolume of mpa |" in text
    table = json.loads(artifact("evaluate-rivals-comparison"))
    assert {"what", "then", "now", "change", "verdict"} == set(table[0])
    assert any(row["what"].startswith("colourfulness: mpa at ") for row in table)


@pytest.mark.parametrize("beside", [0.1], indirect=True)
def test_a_bundle_that_passes_the_gate_becomes_the_champion_when_asked(beside, tmp_path):
    answer = evaluate(beside, tmp_path)
    assert (answer["verdict"], answer["promotion"]) == ("improvement", None)
    assert beside.get_bundle("rivals@champion").version == 2
    told("diffusion-blend.evaluation.finished", answer)
    answer = evaluate(beside, tmp_path, promote=True)
    assert answer["promotion"]["promoted"] is True
    assert beside.get_bundle("rivals@champion").version == 1
    entry = beside.history("rivals")[-1]
    assert (entry.actor, answer["digest"][:12] in entry.reason) == ("evaluate-blend", True)
    # the champion itself is held against the champion before it
    answer = evaluate(beside, tmp_path, promote=True)
    assert answer["comparison"]["against"]["role"] == "the champion before it"
    assert answer["promotion"]["promoted"] is True
    assert len(beside.history("rivals")) == 2
