"""Verb `train`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="Run file, as in infra/runs/train_*.toml.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Checkpoints and results; default: the cache.")
    ] = None,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Register the adapter at the end.")] = True,
    store_url: Annotated[str | None, typer.Option("--store-url", help="Registry; default: the settings.")] = None,
) -> None:
    """Fine-tune one basis adapter on Ray and publish it; run again after an interruption, it resumes."""
    from blend.finetune.config import TrainConfig

    config = TrainConfig.from_toml(run)
    typer.echo(f"Checking {run}: {config.name} toward {config.reward}, {config.iterations} iterations ...", err=True)

    from workers.publishing import check_store, publish_fit, run_directory
    from workers.training import fit_basis

    if publish:
        check_store(store_url)
    directory = output or run_directory(config)
    typer.echo(f"Checkpoints and results go to {directory}", err=True)
    result = fit_basis(config, output_dir=directory)
    gain = (result.tuned_mean - result.base_mean) / max(result.base_std, 1e-9)
    typer.echo(
        f"{config.reward} on held-out prompts: {result.base_mean:.3f} -> {result.tuned_mean:.3f} "
        f"({gain:+.2f} base standard deviations) at a path KL of {result.path_kl:.1f} nats; "
        f"see {result.curve_png} and {result.samples_png}"
    )
    if publish:
        typer.echo(f"Published {publish_fit(config, result, store_url).ref}")
    else:
        typer.echo(str(result.adapter_dir))
