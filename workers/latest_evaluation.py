"""The newest evaluation of the bundle that is served: points with intervals, for `GET /v1/evaluations/latest`."""

from typing import Any

from pydantic import BaseModel

from infra.errors import InfraError
from infra.evaluations import evaluations_behind, evaluations_of
from infra.storage import open_store
from workers.api import Refusal, unavailable
from workers.bundles import find_record
from workers.engine_args import EngineArgs
from workers.loading import settings_of
from workers.model_card import BundleName, ModelCard

# Methods of points that are no blend: the base model, and one adapter alone.
BASE, ADAPTER = "base", "adapter"


class Interval(BaseModel):
    """A mean over prompts and seeds with its 95 % interval."""

    mean: float
    low: float
    high: float


class Point(BaseModel):
    """What one preference scored. `weights` are all 0 for the base model."""

    method: str
    weights: dict[str, float]
    kl_lambda: float
    rewards: dict[str, Interval]


class LatestEvaluation(BaseModel):
    """Body of `GET /v1/evaluations/latest`."""

    bundle: BundleName
    evaluation: str
    date: str
    prompts: int
    seeds: int
    num_inference_steps: int
    guidance_scale: float
    rewards: list[str]
    points: list[Point]


def latest_evaluation(args: EngineArgs, card: ModelCard) -> LatestEvaluation | Refusal:
    """Read it from the registry that holds the bundle; a Refusal where there is none or none that can be read."""
    if args.bundle_ref is None or card.bundle.version is None:
        return _none("a base with adapters by path has no evaluations: publish a bundle and serve that")
    ref = f"{card.bundle.name}@{card.bundle.version}"
    try:
        settings = settings_of(args)
        registry, record = find_record(ref, settings)
        # a bundle that comes with the package is evaluated into the user's own store
        own = evaluations_of(open_store(settings.store_url, settings), record)
        found = own or evaluations_behind(registry, record)
    except InfraError as error:
        return unavailable(f"evaluations cannot be read now: {error}")
    if not found:
        remedy = f"diffusion-blend evaluate infra/runs/evaluate_quick.toml --bundle {ref}"
        return _none(f"{ref} was never evaluated: run `{remedy}`")
    return _told(found[0].digest, found[0].summary, card)


def _none(message: str) -> Refusal:
    return Refusal(status=404, message=message, type="not_found_error")


def _told(digest: str, summary: dict[str, Any], card: ModelCard) -> LatestEvaluation:
    facts, basis = summary["facts"], [adapter.name for adapter in card.basis]
    rewards = list(summary["scales"])
    points = [
        Point(
            method=cell["method"],
            weights={name: cell[f"w_{name}"] for name in basis},
            kl_lambda=cell["kl_lambda"],
            rewards={
                name: Interval(mean=cell[name], low=cell[f"{name}_low"], high=cell[f"{name}_high"]) for name in rewards
            },
        )
        for cell in summary["cells"]
        # what was measured beside it, rivals and retrained models, cannot be asked of this bundle
        if cell["method"] in (BASE, ADAPTER, *card.methods)
    ]
    return LatestEvaluation(
        bundle=card.bundle,
        evaluation=digest,
        date=facts["date"],
        prompts=len(facts["prompts"]),
        seeds=len(facts["seeds"]),
        num_inference_steps=facts["steps"],
        guidance_scale=facts["guidance"],
        rewards=rewards,
        points=points,
    )
