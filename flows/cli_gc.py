"""`diffusion-blend registry gc`: what nothing needs any more, shown, and removed when asked."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_registry import StoreOption, registry_app, registry_at

if TYPE_CHECKING:
    from infra.gc import GcReport

SHOWN = 20
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@registry_app.command()
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove what is shown; without it nothing is touched.")
    ] = False,
    grace: Annotated[str, typer.Option(help="Spare what is younger, such as 12h or 2d.")] = "1d",
    store: StoreOption = "",
) -> None:
    """Show blobs that no version names, as uploads leave them that were cut short; with --delete, remove them."""
    from rich.console import Console

    from infra.gc import collect

    span = duration(grace)
    registry = registry_at(store)
    with Console(stderr=True).status("") as status:
        report = collect(registry, grace=span, delete=delete, on_progress=status.update)
    _show(report, delete)


def duration(text: str) -> timedelta:
    """ "90s", "30m", "12h" or "2d" as a span of time. Raises typer.BadParameter."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not found:
        raise typer.BadParameter(f"--grace {text!r} is no span of time: write a number and s, m, h or d, such as 12h")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _show(report: "GcReport", delete: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if report.orphans:
        table = Table("orphaned blob", "bytes", "stored")
        for orphan in report.orphans[:SHOWN]:
            table.add_row(orphan.path, f"{orphan.size:,}", f"{orphan.modified:%Y-%m-%d %H:%M} UTC")
        if len(report.orphans) > SHOWN:
            table.add_row(f"and {len(report.orphans) - SHOWN} more", "", "")
        Console().print(table)
    typer.echo(f"{report.referenced} blobs in use, {report.young} unused but young, {len(report.orphans)} orphans")
    if delete:
        freed = sum(orphan.size for orphan in report.removed)
        typer.echo(
            f"Removed {len(report.removed)} blobs, {freed:,} bytes, and {report.aborted_uploads} unfinished uploads."
        )
    elif report.orphans:
        typer.echo(f"Nothing was removed; --delete would free {report.bytes:,} bytes.")
