"""Verb `train`."""

import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="Run file, as in infra/runs/train_*.toml.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Results and checkpoints; default: the cache.")
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            metavar="DIR|URL",
            help="Checkpoints alone: a directory that all nodes see, or s3://...; default: with the registry where"
            " that is in S3, else with the results.",
        ),
    ] = None,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Register the adapter at the end.")] = True,
    store_url: Annotated[str | None, typer.Option("--store-url", help="Registry; default: the settings.")] = None,
) -> None:
    """Fine-tune one basis adapter on Ray and publish it; run again after an interruption, it resumes."""
    from blend.finetune.config import TrainConfig

    config = TrainConfig.from_toml(run)
    typer.echo(
        f"Checking {run}: {config.name} toward {config.reward_label}, {config.iterations} iterations ...", err=True
    )

    from workers.checkpoints import checkpoint_location
    from workers.publishing import check_store, publish_fit, run_directory
    from workers.training import TrainJob, fit_basis
    from workers.training_report import outcome_sentence

    if publish:
        check_store(store_url)
    directory = output or run_directory(config)
    kept = checkpoints or checkpoint_location(TrainJob.prepare(config).run, directory, store_url)
    typer.echo(f"Results go to {directory}, checkpoints to {kept}", err=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = fit_basis(config, output_dir=directory, storage_path=kept)
    except KeyboardInterrupt:
        typer.echo("Interrupted: run the same command again to resume from the last checkpoint.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{outcome_sentence(config, result.metrics)}; see {result.curve_png} and {result.samples_png}")
    if publish:
        typer.echo(f"Published {publish_fit(config, result, store_url).ref}")
    else:
        typer.echo(str(result.adapter_dir))


def _interrupt(*_: object) -> NoReturn:
    """What a supervisor's SIGTERM does: the same as Ctrl-C, so that the Ray job is stopped and not orphaned."""
    raise KeyboardInterrupt
