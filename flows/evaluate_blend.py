"""Flow: score a bundle on a grid of preferences and methods, store the result and report it as artifacts."""

import json
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from flows.progress import show_progress
from workers.evaluation import EvaluateConfig, EvaluationError, Plan, Progress
from workers.evaluation.files import COMMIT, REPORT, files_in
from workers.evaluation.storing import evaluation_store, folder, is_complete, prepare, run_directory
from workers.evaluation.storing import restore as restore_files
from workers.evaluation.storing import upload as upload_files


@flow(name="evaluate-blend")
def evaluate_blend(
    run: dict[str, Any] | str | None = None, store_url: str | None = None, output_dir: str | None = None
) -> dict[str, Any]:
    """Evaluate what `run` describes (settings, the path of a run file, or by default the champion).

    Returns digest, location (URL in the store), report (path of the HTML file here) and headline. The same evaluation
    is never done twice: one that the store has is fetched from it.
    """
    planned = validate_run(run, store_url)
    directory = Path(output_dir) if output_dir else run_directory(planned)
    if not restore(planned, directory, store_url):
        score(planned, directory)
        upload(planned, directory, store_url)
    return report(planned, directory, store_url)


@task(cache_policy=NO_CACHE)
def validate_run(run: dict[str, Any] | str | None, store_url: str | None) -> Plan:
    """The plan, after everything that could fail later was looked at: names, prompts, bundle, store."""
    config = EvaluateConfig.from_toml(run) if isinstance(run, str) else EvaluateConfig.parse(run or {})
    planned = prepare(config, store_url)
    evaluation_store(store_url).probe()
    return planned


@task(cache_policy=NO_CACHE)
def restore(planned: Plan, directory: Path, store_url: str | None) -> bool:
    """Fetch the evaluation from the store, if it was done before."""
    found = restore_files(planned, directory, evaluation_store(store_url))
    if found:
        get_run_logger().info("evaluation %s was done before; fetched it", planned.digest[:12])
    return found


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return not isinstance(error, EvaluationError)


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, retry_condition_fn=_is_transient)
def score(planned: Plan, directory: Path) -> None:
    """Generate and score every sample on Ray, showing progress and time left."""
    from workers.evaluation import evaluate

    if is_complete(planned, directory):
        return
    logger = get_run_logger()
    description = f"{planned.job.bundle.ref}: {len(planned.job.cells)} settings"
    artifact = create_progress_artifact(progress=0.0, key=artifact_key(planned, "progress"), description=description)
    shown = 0.0

    def show(progress: Progress) -> None:
        nonlocal shown
        share = progress.done / progress.total
        if share - shown >= 0.05 or share == 1:
            shown = share
            show_progress(artifact, 100.0 * share)
            logger.info(progress_line(progress))

    evaluate(planned, directory, show)


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2, 10, 30])
def upload(planned: Plan, directory: Path, store_url: str | None) -> None:
    """Store the files, the summary last."""
    get_run_logger().info("stored in %s", upload_files(planned, files_in(directory), evaluation_store(store_url)))


@task(cache_policy=NO_CACHE)
def report(planned: Plan, directory: Path, store_url: str | None) -> dict[str, Any]:
    """Headline as markdown, figures as tables, the report as a link."""
    summary = json.loads((directory / COMMIT).read_text())
    ref, location = planned.job.bundle.ref, f"{evaluation_store(store_url).url.rstrip('/')}/{folder(planned)}"
    create_markdown_artifact(
        markdown=markdown(summary, location),
        key=artifact_key(planned, "report"),
        description=f"What came out of evaluating {ref}",
    )
    create_table_artifact(
        table=summary["cells"], key=artifact_key(planned, "cells"), description=f"All results of {ref}"
    )
    create_table_artifact(
        table=summary["hypervolumes"], key=artifact_key(planned, "hypervolumes"), description=f"Reach of {ref}"
    )
    create_link_artifact(link=f"{location}/{REPORT}", link_text=f"Report on {ref}", key=artifact_key(planned, "link"))
    return {
        "digest": planned.digest,
        "location": location,
        "report": str(directory / REPORT),
        "headline": summary["headline"],
    }


def artifact_key(planned: Plan, kind: str) -> str:
    """Prefect allows lower-case letters, digits and dashes."""
    name = planned.job.bundle.record.name.replace("_", "-").replace(".", "-")
    return f"evaluate-{name}-{kind}"


def progress_line(progress: Progress) -> str:
    """How far it is, in words."""
    left = "" if progress.seconds_left is None else f", about {progress.seconds_left / 60:.1f} minutes left"
    return f"{progress.done}/{progress.total} images{left}"


def markdown(summary: dict[str, Any], location: str) -> str:
    """The headline and what it rests on."""
    facts = summary["facts"]
    return "\n\n".join(
        [
            f"# Evaluation of {facts['bundle']}",
            *summary["headline"],
            f"{len(facts['prompts'])} prompts × {len(facts['seeds'])} seeds × {facts['cells']} settings, "
            f"{facts['steps']} steps, guidance {facts['guidance']}. Files: `{location}`",
        ]
    )
