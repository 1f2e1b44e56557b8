"""Flow: score a bundle on a grid of preferences and methods, hold it against the champion, store and report it.

It runs every night and whenever a bundle is registered: see infra/prefect.yaml.
"""

import json
from dataclasses import asdict
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

from flows.evaluation_report import comparison_table, condensed, markdown
from flows.events import FINISHED, REGRESSED, emit
from flows.progress import show_progress
from infra.comparing import REGRESSION
from infra.errors import AliasMovedError, StoreError
from workers.evaluation import EvaluateConfig, EvaluationError, Plan, Progress
from workers.evaluation.comparison import compare_stored
from workers.evaluation.files import COMMIT, REPORT, files_in
from workers.evaluation.storing import (
    evaluation_store,
    folder,
    is_complete,
    open_ledger,
    prepare,
    ready,
    run_directory,
)
from workers.evaluation.storing import restore as restore_files
from workers.evaluation.storing import upload as upload_files


def tell(_flow: Any, flow_run: Any, state: Any) -> None:
    """Emit what came of a run once it has ended, so that an automation may mark the run."""
    answer = state.result()
    run = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}
    event = REGRESSED if answer["verdict"] == REGRESSION else FINISHED
    emit(event, answer["bundle"], answer | {"text": " ".join(answer["comparison"]["sentences"])}, [run])


@flow(name="evaluate-blend", on_completion=[tell])
def evaluate_blend(
    run: dict[str, Any] | str | None = None,
    store_url: str | None = None,
    output_dir: str | None = None,
    promote: bool = False,
) -> dict[str, Any]:
    """Evaluate what `run` describes (settings, the path of a run file, or by default the champion).

    Returns bundle, digest, location (URL in the store), report (path of the HTML file here), headline, verdict and
    comparison (beside the champion's evaluation), promotion. The same evaluation is never done twice: one that the
    store has is fetched from it. With `promote`, a bundle that passes the gate becomes the champion of its name.
    """
    planned = validate_run(run, store_url)
    directory = Path(output_dir) if output_dir else run_directory(planned)
    stored = restore(planned, directory, store_url)
    if not stored:
        score(planned, directory, store_url)
    comparison = compare(planned, directory, store_url)
    if not stored:
        upload(planned, directory, store_url)
    promotion = make_champion(planned, store_url) if promote else None
    return report(planned, directory, store_url, comparison, promotion)


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


def _is_outage(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), StoreError | AliasMovedError)


@task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, retry_condition_fn=_is_transient)
def score(planned: Plan, directory: Path, store_url: str | None) -> None:
    """Generate and score every sample on Ray, showing progress and time left; a retry goes on where it was stopped."""
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

    planned = ready(planned, store_url)
    evaluate(planned, directory, show, open_ledger(planned, evaluation_store(store_url)))
    show_progress(artifact, 100.0)


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2, 10, 30])
def upload(planned: Plan, directory: Path, store_url: str | None) -> None:
    """Store the files, the summary last."""
    get_run_logger().info("stored in %s", upload_files(planned, files_in(directory), evaluation_store(store_url)))


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2, 10, 30], retry_condition_fn=_is_outage)
def compare(planned: Plan, directory: Path, store_url: str | None) -> dict[str, Any]:
    """Hold it against the champion's evaluation, before anything is promoted."""
    comparison = compare_stored(planned, directory, store_url)
    get_run_logger().info("%s: %s", comparison["verdict"], " ".join(comparison["sentences"]))
    return comparison


@task(cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[2, 10, 30], retry_condition_fn=_is_outage)
def make_champion(planned: Plan, store_url: str | None) -> dict[str, Any]:
    """Promote the bundle if this evaluation of it passes the gate; promoted and reason."""
    from workers.basis import promote

    ref = planned.job.bundle.ref
    found = promote(ref, "evaluated by evaluate-blend", store_url, "evaluate-blend", planned.digest)
    get_run_logger().info("%s %s: %s", ref, "is the champion" if found.promoted else "is left", found.reason)
    return asdict(found)


@task(cache_policy=NO_CACHE)
def report(
    planned: Plan,
    directory: Path,
    store_url: str | None,
    comparison: dict[str, Any],
    promotion: dict[str, Any] | None,
) -> dict[str, Any]:
    """Headline and comparison as markdown, figures as tables, the report as a link."""
    summary = json.loads((directory / COMMIT).read_text())
    ref, location = planned.job.bundle.ref, f"{evaluation_store(store_url).url.rstrip('/')}/{folder(planned)}"
    create_markdown_artifact(
        markdown=markdown(summary, comparison, promotion, location),
        key=artifact_key(planned, "report"),
        description=f"What came out of evaluating {ref}",
    )
    tables = {"cells": summary["cells"], "hypervolumes": summary["hypervolumes"]}
    for name, table in (tables | {"comparison": comparison_table(comparison)}).items():
        create_table_artifact(table=table, key=artifact_key(planned, name), description=f"{name.capitalize()} of {ref}")
    create_link_artifact(link=f"{location}/{REPORT}", link_text=f"Report on {ref}", key=artifact_key(planned, "link"))
    answer = {"bundle": ref, "digest": planned.digest, "location": location, "report": str(directory / REPORT)}
    found = {"verdict": comparison["verdict"], "comparison": condensed(comparison), "promotion": promotion}
    return answer | {"headline": summary["headline"]} | found


def artifact_key(planned: Plan, kind: str) -> str:
    """Prefect allows lower-case letters, digits and dashes."""
    name = planned.job.bundle.record.name.replace("_", "-").replace(".", "-")
    return f"evaluate-{name}-{kind}"


def progress_line(progress: Progress) -> str:
    """How far it is, in words."""
    left = "" if progress.seconds_left is None else f", about {progress.seconds_left / 60:.1f} minutes left"
    return f"{progress.done}/{progress.total} images{left}"
