"""From a finished training run to a registry record; used by the flow and by the command line alike."""

from collections.abc import Mapping
from pathlib import Path

from blend.adapters import ATTENTION_TARGETS
from blend.finetune.config import TrainConfig
from blend.finetune.trainer import Metrics
from blend.model import model_hash
from blend.rewards import load_reward
from infra.manifests import AdapterFacts, AdapterRecord, BaseIdentity, Metric
from infra.registry import Registry
from infra.settings import Settings, read_settings
from infra.storage import open_store
from workers.bundles import resolve_base
from workers.training import FitResult, TrainJob


def open_registry(store_url: str | None, settings: Settings | None = None) -> Registry:
    """The registry at `store_url`, or the one of the settings."""
    settings = settings or read_settings()
    return Registry(open_store(store_url or settings.store_url, settings))


def check_store(store_url: str | None) -> None:
    """Raise a StoreError now rather than after hours of training."""
    open_registry(store_url).check_writable()


def run_directory(config: TrainConfig) -> Path:
    """Where a run keeps its checkpoints: the same for the same run, so that a retry resumes instead of repeating."""
    return read_settings().cache_dir / "training" / f"{config.name}-{TrainJob.prepare(config).digest}"


def publish_fit(
    config: TrainConfig, result: FitResult, store_url: str | None = None, run_ids: Mapping[str, str] | None = None
) -> AdapterRecord:
    """Publish the adapter's directory; the same run published again is the version that is already there."""
    reward = load_reward(config.reward)
    base_path = resolve_base(config.base_model)
    local = Path(config.base_model).is_dir()
    facts = AdapterFacts(
        base=BaseIdentity(source=base_path if local else config.base_model, sha256=model_hash(base_path)),
        rank=config.rank,
        alpha=float(config.rank),
        target_modules=ATTENTION_TARGETS,
        reward=config.reward,
        reward_version=reward.version,
        reward_sha256=getattr(reward, "sha256", None),
        kl_weight=config.kl_weight,
        seed=config.seed,
        metrics={
            "base_reward": _measured(result.metrics[0]),
            "tuned_reward": _measured([m for m in result.metrics if "held_out_mean" in m][-1]),
            "base_std": Metric(value=result.base_std),
            "path_kl": Metric(value=result.path_kl),
        },
        run_ids=dict(run_ids or {}),
    )
    return open_registry(store_url).publish_adapter(config.name, result.adapter_dir, facts)


def _measured(metrics: Metrics) -> Metric:
    mean, margin = metrics["held_out_mean"], metrics["held_out_ci"]
    return Metric(value=mean, low=mean - margin, high=mean + margin)
