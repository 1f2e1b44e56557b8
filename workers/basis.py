"""From published adapters to a bundle: the last step of a basis, and the promotion of what was evaluated."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blend.finetune.config import TrainConfig
from infra.errors import UnknownRecordError
from infra.evaluations import PromotionError, champion_of, check_promotion, choose, evaluations_behind
from infra.kl_budget import kl_difference
from infra.manifests import AdapterRecord, BundleDefaults, BundleRecord, Metric
from infra.recommending import lambda_range, weight_ranges
from workers.publishing import open_registry

log = logging.getLogger(__name__)


def join_basis(
    name: str, adapters: Mapping[str, AdapterRecord], run: TrainConfig, store_url: str | None = None
) -> BundleRecord:
    """Publish adapters of one base, {basis name: record}, as bundle `name`; the same ones again are the same version.

    Requests get the sampler that `run`, any of the runs, was scored with unless they say otherwise. Adapters of
    clearly different KL are flagged in the log, with the figures.
    """
    if flag := kl_difference(adapters):
        log.warning("bundle %s: %s", name, flag)
    base = next(iter(adapters.values())).base
    defaults = BundleDefaults(guidance_scale=run.eval_guidance_scale, num_inference_steps=run.num_inference_steps)
    return open_registry(store_url).publish_bundle(name, base, adapters, defaults=defaults)


@dataclass(frozen=True, slots=True)
class Promotion:
    """Whether a bundle is its name's champion now, and what speaks for or against it."""

    promoted: bool
    reason: str


def promote(
    ref: str, reason: str, store_url: str | None = None, actor: str = "full-pipeline", evaluation: str | None = None
) -> Promotion:
    """Make `ref` (name@version) its name's champion if its evaluation, the newest unless one is named, allows.

    One that the gate refuses, or that is not in the store but comes with the package, is left as it is.
    """
    registry = open_registry(store_url)
    try:
        record = registry.get_bundle(ref)
        found = check_promotion(registry, record, champion_of(registry, record.name), evaluation)
        registry.promote(record.name, record.version, actor=actor, reason=f"{reason}; {found}")
    except (PromotionError, UnknownRecordError) as error:
        log.warning("%s is not promoted: %s", ref, error)
        return Promotion(False, str(error))
    return Promotion(True, found)


def recommend(ref: str, evaluation: str | None = None, store_url: str | None = None) -> BundleRecord:
    """The bundle with the ranges that an evaluation of it speaks for, as a version whose parent is `ref`.

    `evaluation`: how its digest begins; the newest unless given. Ranges it has already are no new version. Raises
    PromotionError without such an evaluation.
    """
    registry = open_registry(store_url)
    bundle = registry.get_bundle(ref)
    chosen = choose(evaluations_behind(registry, bundle), bundle, evaluation)
    method = bundle.defaults.method
    ranges = {
        "weight_ranges": weight_ranges(chosen.summary, method),
        "lambda_range": lambda_range(chosen.summary, method),
    }
    if all(getattr(bundle, field) == found for field, found in ranges.items()):
        return bundle
    facts = {"defaults": bundle.defaults, "licence": bundle.licence, "metrics": bundle.metrics}
    run_ids = {**bundle.run_ids, "evaluation": chosen.digest}
    return registry.publish_bundle(
        bundle.name, bundle.base, registry.adapters_of(bundle), parent=bundle.ref, run_ids=run_ids, **facts, **ranges
    )


def gain_table(adapters: Sequence[AdapterRecord]) -> list[dict[str, float | str]]:
    """Held-out reward of the base and of each adapter: mean with its 95 % interval, and the gain in base deviations."""
    rows: list[dict[str, float | str]] = []
    for record in adapters:
        base, tuned = record.metrics["base_reward"], record.metrics["tuned_reward"]
        gain = (tuned.value - base.value) / max(record.metrics["base_std"].value, 1e-9)
        rows.append(
            {
                "adapter": record.ref,
                "reward": record.reward,
                "base": interval(base),
                "tuned": interval(tuned),
                "gain_in_base_std": round(gain, 3),
            }
        )
    return rows


def interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
