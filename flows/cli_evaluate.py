"""Verb `evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from blend.finetune.config import TrainConfig
    from infra.storage import Store
    from workers.evaluation import Plan


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="Run file, as in infra/runs/evaluate_*.toml.")],
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="NAME@ALIAS", help="Bundle instead of the run file's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the files go; default: the cache.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, metavar="N", help="Ray workers; 0 works in this process."),
    ] = None,
    store: Annotated[bool, typer.Option("--store/--no-store", help="Keep the result in the store.")] = True,
    store_url: Annotated[str | None, typer.Option("--store-url", help="Registry; default: the settings.")] = None,
) -> None:
    """Score a grid of preferences and methods on held-out prompts and write a report."""
    from workers.evaluation.config import EvaluateConfig

    config = EvaluateConfig.from_toml(run)
    asked = {"bundle": bundle, "num_workers": workers}
    config = config.model_copy(update={key: value for key, value in asked.items() if value is not None})
    typer.echo(f"Checking {run} against {config.bundle} ...", err=True)

    from workers.evaluation.files import REPORT, files_in
    from workers.evaluation.storing import evaluation_store, headline, prepare, restore, run_directory, upload

    planned = prepare(config, store_url)
    target = evaluation_store(store_url) if store else None
    if target is not None:
        target.probe()
    directory = output or run_directory(planned)
    stored = target is not None and restore(planned, directory, target)
    if stored:
        typer.echo("This evaluation was done before; fetched it from the store.", err=True)
    else:
        _score(planned, directory, target, store_url)
    compared = _compare(planned, directory, store_url)
    if target is not None and not stored:
        typer.echo(f"Stored in {upload(planned, files_in(directory), target)}", err=True)
    for sentence in [*headline(directory), *compared]:
        typer.echo(sentence)
    typer.echo(f"Report: {directory / REPORT}")


def _score(planned: "Plan", directory: Path, target: "Store | None", store_url: str | None) -> None:
    from workers.evaluation import evaluate as run_evaluation
    from workers.evaluation.storing import is_complete, open_ledger, ready

    if is_complete(planned, directory):
        return
    job = planned.job
    size = f"{len(job.cells)} settings x {len(job.prompts)} prompts x {len(job.config.seeds)} seeds"
    typer.echo(f"{size}; files go to {directory}", err=True)
    planned = ready(planned, store_url, _announce)
    run_evaluation(planned, directory, ledger=open_ledger(planned, target))


def _announce(place: int, total: int, run: "TrainConfig") -> None:
    """Say which oracle is trained now."""
    typer.echo(
        f"Oracle {place + 1} of {total}: training toward {run.reward_label}, alpha {run.kl_weight:.3g}", err=True
    )


def _compare(planned: "Plan", directory: Path, store_url: str | None) -> list[str]:
    """Hold it against the champion; a store that cannot say what that scored does not undo the evaluation."""
    from infra.errors import InfraError
    from workers.evaluation.comparison import compare_stored

    try:
        comparison = compare_stored(planned, directory, store_url)
    except InfraError as error:
        return [f"Not compared with the champion: {error}"]
    return list(comparison["sentences"])
