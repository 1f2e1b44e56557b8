"""From a finished training run to a registry record; used by the flow and by the command line alike."""

from collections.abc import Mapping
from pathlib import Path

from blend.adapters import ATTENTION_TARGETS
from blend.finetune.config import TrainConfig
from blend.model import model_hash
from blend.rewards import load_reward
from infra.manifests import AdapterFacts, AdapterRecord, BaseIdentity, Metric
from infra.registry import Registry
from infra.settings import Settings, read_settings
from infra.storage import open_store
from workers.bundles import resolve_base
from workers.provenance import base_licence, git_commit
from workers.training import FitResult, TrainJob
from workers.training_report import Outcome

UNKNOWN_LICENCE = "that of the base model"


def open_registry(store_url: str | None, settings: Settings | None = None) -> Registry:
    """The registry at `store_url`, or the one of the settings."""
    settings = settings or read_settings()
    return Registry(open_store(store_url or settings.store_url, settings))


def check_store(store_url: str | None) -> None:
    """Raise a StoreError now rather than after hours of training."""
    open_registry(store_url).check_writable()


def run_directory(config: TrainConfig) -> Path:
    """Where a run keeps its checkpoints: the same for the same run, so that a retry resumes instead of repeating."""
    return read_settings().cache_dir / "training" / TrainJob.prepare(config).run


def publish_fit(
    config: TrainConfig, result: FitResult, store_url: str | None = None, run_ids: Mapping[str, str] | None = None
) -> AdapterRecord:
    """Publish the adapter's directory; the same run published again is the version that is already there."""
    rewards = [load_reward(name) for name in config.rewards]
    base_path = resolve_base(config.base_model)
    local = Path(config.base_model).is_dir()
    facts = AdapterFacts(
        base=BaseIdentity(source=base_path if local else config.base_model, sha256=model_hash(base_path)),
        rank=config.rank,
        alpha=float(config.rank),
        target_modules=ATTENTION_TARGETS,
        reward=config.reward_label,
        reward_version=" + ".join(reward.version for reward in rewards),
        reward_sha256=getattr(rewards[0], "sha256", None) if len(rewards) == 1 else None,
        kl_weight=result.kl_weight,
        kl_target=config.kl_target,
        seed=config.seed,
        licence=base_licence(config.base_model) or UNKNOWN_LICENCE,
        git_commit=git_commit(),
        metrics=measured(config, result),
        run_ids=dict(run_ids or {}),
    )
    return open_registry(store_url).publish_adapter(config.name, result.adapter_dir, facts)


def manifest_url(record: AdapterRecord, store_url: str | None = None) -> str:
    """Where the record lies in the store."""
    store = store_url or read_settings().store_url
    return f"{store.rstrip('/')}/adapters/{record.name}/versions/{record.version:06d}.json"


def measured(config: TrainConfig, result: FitResult) -> dict[str, Metric]:
    """The manifest's metrics: held-out figures of the base and of the published adapter."""
    outcome = Outcome.of(config, result.metrics)
    images = config.held_out_images
    metrics = {
        "base_reward": _interval(outcome.base["held_out_mean"], outcome.base["held_out_ci"], images),
        "tuned_reward": _interval(outcome.tuned["held_out_mean"], outcome.tuned["held_out_ci"], images),
        "base_std": Metric(value=result.base_std, n=images),
        "path_kl": Metric(value=result.path_kl, n=images),
        "alpha": Metric(value=outcome.alpha),
        "iterations": Metric(value=outcome.tuned["iteration"]),
    }
    if outcome.diversity is not None:
        for name, value in zip(("base_diversity", "tuned_diversity"), outcome.diversity, strict=True):
            metrics[name] = Metric(value=value, n=images)
    for name, (before, after) in outcome.watched.items():
        metrics[f"base_{name}"] = _interval(before["mean"], before["ci"], images)
        metrics[f"tuned_{name}"] = _interval(after["mean"], after["ci"], images)
    return metrics


def _interval(mean: float, margin: float, count: int) -> Metric:
    return Metric(value=mean, low=mean - margin, high=mean + margin, n=count)
