"""From published adapters to a bundle: the last step of a basis, and the promotion of what was evaluated."""

from collections.abc import Mapping, Sequence

from blend.finetune.config import TrainConfig
from infra.manifests import AdapterRecord, BundleDefaults, BundleRecord, Metric
from workers.publishing import open_registry


def join_basis(
    name: str, adapters: Mapping[str, AdapterRecord], run: TrainConfig, store_url: str | None = None
) -> BundleRecord:
    """Publish adapters of one base, {basis name: record}, as bundle `name`; the same ones again are the same version.

    Requests get the sampler that `run`, any of the runs, was scored with unless they say otherwise.
    """
    base = next(iter(adapters.values())).base
    defaults = BundleDefaults(guidance_scale=run.eval_guidance_scale, num_inference_steps=run.num_inference_steps)
    return open_registry(store_url).publish_bundle(name, base, adapters, defaults=defaults)


def promote(ref: str, reason: str, store_url: str | None = None, actor: str = "full-pipeline") -> None:
    """Make `ref` (name@version) its name's champion; nothing changes when it is already."""
    registry = open_registry(store_url)
    record = registry.get_bundle(ref)
    registry.promote(record.name, record.version, actor=actor, reason=reason)


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
