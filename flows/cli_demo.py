"""Verb `demo`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    run: Annotated[
        Path | None, typer.Option("--run", help="Parameters of the full-pipeline flow; default: infra/runs/demo.toml.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where results go.")] = Path("outputs/demo"),
    store_url: Annotated[
        str | None, typer.Option("--store-url", help="Registry; default: a directory with the results.")
    ] = None,
    stay: Annotated[
        bool | None, typer.Option("--stay/--no-stay", help="Stay up until Ctrl-C; default: only in a terminal.")
    ] = None,
) -> None:
    """Do the whole job here: fine-tune two adapters, register, evaluate, serve, and make one HTTP request."""
    from rich.console import Console

    from flows.demo import RUN_FILE, run_demo

    if stay is None:
        stay = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        run_demo(run or RUN_FILE, output_dir, store_url, stay, Console())
    except KeyboardInterrupt:
        print("Interrupted; everything the demo started has ended.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # threads of the interrupted flow would keep the interpreter waiting for results that cannot come
        os._exit(130)
