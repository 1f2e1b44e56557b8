"""The command line `diffusion-blend`: one typer application; every verb lives in its own flows.cli_* module.

The modules import torch, ray and prefect inside their commands only: `--help` and usage errors are instant.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer
from typer.exceptions import TyperException

VERB_MODULES = (
    "flows.cli_demo",
    "flows.cli_pretrain",
    "flows.cli_train",
    "flows.cli_evaluate",
    "flows.cli_generate",
    "flows.cli_serve",
    "flows.cli_registry",
)
TRACEBACK_VARIABLE = "DIFFUSION_BLEND_TRACEBACK"

app = typer.Typer(
    name="diffusion-blend",
    help="Blend reward-tuned diffusion adapters at inference: any preference mix, any KL strength.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    if traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"


for module in VERB_MODULES:
    import_module(module).register(app)


def error_line(error: BaseException) -> str:
    """One line for any error: fields and messages of a validation error, else the message unwrapped."""
    if isinstance(error, TyperException):
        return " ".join(error.format_message().split())
    if hasattr(error, "errors") and hasattr(error, "error_count"):
        found = ["{}: {}".format(".".join(map(str, e["loc"])) or "input", e["msg"]) for e in error.errors()]
        return "; ".join(found)
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors become one line on stderr and exit code 2, Ctrl-C becomes 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"Error: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
