"""The evaluation that the page draws: the shipped one, the user's own before it, or a word on how to make one."""

import json
import shutil

from blend.sprites import REGISTRY_PATH
from infra.manifests import AdapterRecord
from workers.api import Refusal
from workers.bundles import find_record
from workers.engine_args import EngineArgs
from workers.latest_evaluation import latest_evaluation
from workers.loading import settings_of
from workers.model_card import BasisCard, BundleName, Defaults, Limits, ModelCard


def card_of(args: EngineArgs) -> ModelCard:
    _, record = find_record(args.bundle_ref, settings_of(args))
    return ModelCard(
        id=record.name,
        accepted_names=[record.name],
        bundle=BundleName(name=record.name, version=record.version, digest=record.digest),
        basis=[BasisCard(name=name) for name in record.adapters],
        methods=["mpa"],
        kl_lambda_range=(0, 3),
        kl_lambda_recommended=(0, 1.5),
        defaults=Defaults(weights=None, num_inference_steps=20, guidance_scale=3.0, size="64x64"),
        limits=Limits(size_multiple=16, min_size=16, max_size=128, max_prompt_tokens=16),
    )


def test_the_shipped_bundle_comes_with_its_evaluation(tmp_path):
    args = EngineArgs(store_url=f"file://{tmp_path}")
    told = latest_evaluation(args, card_of(args))
    assert (told.bundle.name, told.prompts, told.seeds) == ("sprites", 16, 4)
    assert set(told.rewards) == {"brightness", "colourfulness", "compressibility"}
    for point in told.points:
        assert set(point.weights) == set(told.rewards)
        for interval in point.rewards.values():
            assert interval.low <= interval.mean <= interval.high
    alone = {name: point for point in told.points for name, weight in point.weights.items() if weight == 1}
    base = next(point for point in told.points if point.method == "base")
    for name, point in alone.items():
        assert point.rewards[name].mean > base.rewards[name].high, "an adapter gains in its own reward"


def test_the_users_own_evaluation_comes_before_the_shipped_one(tmp_path):
    args = EngineArgs(store_url=f"file://{tmp_path}")
    card = card_of(args)
    folder = tmp_path / "evaluations" / card.bundle.digest / "own"
    [shipped] = (REGISTRY_PATH / "evaluations" / card.bundle.digest).glob("*/summary.json")
    shutil.copytree(shipped.parent, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["facts"]["seeds"] = [0, 1]
    # measured beside the bundle, not part of it: the page could not ask for them
    summary["cells"] += [summary["cells"][-1] | {"method": method} for method in ("oracle", "code_20_5")]
    (folder / "summary.json").write_text(json.dumps(summary))
    told = latest_evaluation(args, card)
    assert (told.evaluation, told.seeds) == ("own", 2)
    assert {point.method for point in told.points} == {"base", "adapter", "mpa"}
    (folder / "summary.json").write_text("{")
    damaged = latest_evaluation(args, card)
    assert isinstance(damaged, Refusal)
    assert "damaged" in damaged.message


def test_a_bundle_without_one_is_told_how_to_make_it(tiny_store_url):
    args = EngineArgs(bundle="tiny@champion", store_url=tiny_store_url)
    told = latest_evaluation(args, card_of(args))
    assert told.status == 404
    assert "diffusion-blend evaluate" in told.message
    assert "tiny@1" in told.message


def test_adapters_by_path_have_none(client):
    answer = client.get("/v1/evaluations/latest")
    assert answer.status_code == 404
    assert "publish" in answer.json()["error"]["message"]


def test_shipped_adapters_are_those_of_the_card(tmp_path):
    args = EngineArgs(store_url=f"file://{tmp_path}")
    registry, record = find_record(args.bundle_ref, settings_of(args))
    assert all(isinstance(adapter, AdapterRecord) for adapter in registry.adapters_of(record).values())
