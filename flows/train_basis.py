"""Flow: fine-tune one basis adapter for one reward and publish it. A retry resumes, and never publishes twice."""

import logging
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)

from blend.finetune.config import TrainConfig
from blend.finetune.errors import FinetuneError
from flows.progress import show_progress
from infra.manifests import AdapterRecord
from workers.training import FitResult

TABLE_COLUMNS = (
    "iteration",
    "reward_mean",
    "reward_ci",
    "path_kl",
    "kl_weight",
    "held_out_mean",
    "held_out_ci",
    "held_out_path_kl",
    "held_out_diversity",
    "seconds",
)


def name_run() -> str:
    """What a flow run is called: its adapter, or its run file."""
    run = runtime.flow_run.parameters["run"]
    return f"train-{run.get('name', 'unnamed') if isinstance(run, dict) else Path(run).stem}"


@flow(name="train-basis", flow_run_name=name_run)
def train_basis(
    run: dict[str, Any] | str,
    store_url: str | None = None,
    output_dir: str | None = None,
    checkpoints: str | None = None,
) -> dict[str, Any]:
    """Train what `run` describes (settings, or the path of a run file) and return the published record.

    output_dir keeps results (default: a directory of this run in the cache), checkpoints what a cancelled or failed run
    resumes from: a directory that all nodes see or an s3:// URL (default: as `diffusion-blend train` has it).
    """
    config = validate_run(run, store_url)
    result = fit(config, output_dir, checkpoints, store_url)
    record = publish(config, result, store_url)
    report(config, result, record, store_url)
    return record.model_dump(mode="json")


@task
def validate_run(run: dict[str, Any] | str, store_url: str | None) -> TrainConfig:
    """The run's settings, after everything that could fail later was looked at: reward, prompts, base, store."""
    from workers.publishing import check_store
    from workers.training import TrainJob

    config = TrainConfig.parse(run) if isinstance(run, dict) else TrainConfig.from_toml(run)
    TrainJob.prepare(config)
    check_store(store_url)
    return config


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return not isinstance(error, FinetuneError)


@task(retries=1, retry_delay_seconds=5, retry_condition_fn=_is_transient)
def fit(
    config: TrainConfig, output_dir: str | None, checkpoints: str | None, store_url: str | None = None
) -> FitResult:
    """Train on Ray, showing progress as it goes; a cancelled one says how to go on."""
    from workers.checkpoints import checkpoint_location
    from workers.publishing import run_directory
    from workers.training import TrainJob, fit_basis
    from workers.training_display import progress_line

    logger = get_run_logger()
    description = f"{config.name}: {config.iterations} iterations toward {config.reward_label}"
    key = artifact_key(config.name, "progress")
    artifact = create_progress_artifact(progress=0.0, key=key, description=description)

    def show(metrics: dict[str, Any]) -> None:
        show_progress(artifact, 100.0 * metrics["iteration"] / metrics["iterations"])
        logger.info("%s %s", config.name, progress_line(metrics))

    directory = Path(output_dir) if output_dir else run_directory(config)
    kept = checkpoints or checkpoint_location(TrainJob.prepare(config).run, directory, store_url)
    try:
        # where the log says less than INFO, the terminal is told
        quiet = not logger.isEnabledFor(logging.INFO)
        result = fit_basis(config, output_dir=directory, storage_path=kept, on_progress=show, show_bar=quiet)
    except BaseException as error:
        if not isinstance(error, Exception):
            logger.warning("%s was interrupted: run the flow again with the same parameters to resume", config.name)
        raise
    show_progress(artifact, 100.0)
    return result


@task(retries=3, retry_delay_seconds=[2, 10, 30])
def publish(config: TrainConfig, result: FitResult, store_url: str | None) -> AdapterRecord:
    """Register the adapter; publishing the same run again gives the version that is already there."""
    from workers.publishing import publish_fit

    record = publish_fit(config, result, store_url, run_ids={"prefect": str(runtime.flow_run.id)})
    get_run_logger().info("published %s", record.ref)
    return record


@task
def report(config: TrainConfig, result: FitResult, record: AdapterRecord, store_url: str | None) -> None:
    """Metrics as a table; outcome, curve and samples as markdown; a link to the record in the store."""
    from workers.publishing import manifest_url
    from workers.training_report import markdown_report

    table = [{key: metrics.get(key) for key in TABLE_COLUMNS} for metrics in result.metrics]
    create_table_artifact(table=table, key=artifact_key(config.name, "metrics"), description=f"Metrics of {record.ref}")
    create_markdown_artifact(
        markdown=markdown_report(config, result.metrics, record.ref, result.curve_png, result.samples_png),
        key=artifact_key(config.name, "report"),
        description=f"How {record.ref} was trained",
    )
    create_link_artifact(
        link=manifest_url(record, store_url),
        link_text=record.ref,
        key=artifact_key(config.name, "adapter"),
        description=f"The manifest of {record.ref}, which names its files",
    )


def artifact_key(name: str, kind: str) -> str:
    """The key of a run's artifact; Prefect allows lower-case letters, digits and dashes."""
    return f"train-{name}-{kind}".replace("_", "-").replace(".", "-")
