"""`diffusion-blend registry gc`: finds blobs that no version needs, and removes them when asked."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from infra.gc import GcReport

MAX_ROWS = 50
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; nothing is changed without this.")] = False,
    grace: Annotated[str, typer.Option(help="Spare what is younger: a number and s, m, h or d, as in 12h.")] = "1d",
    store: Annotated[
        str, typer.Option("--store", help="file:// or s3:// URL; DIFFUSION_BLEND_STORE_URL unless given.")
    ] = "",
) -> None:
    """Show what uploads that were cut short left behind; with --delete, remove it."""
    from rich.console import Console

    from infra.gc import collect
    from infra.registry import Registry
    from infra.settings import read_settings
    from infra.storage import open_store

    spared = _duration(grace)
    settings = read_settings()
    registry = Registry(open_store(store or settings.store_url, settings))
    with Console(stderr=True).status("") as status:
        report = collect(registry, grace=spared, delete=delete, on_progress=status.update)
    if report.orphans:
        _print_table(report, delete=delete)
    typer.echo(_summary(report, registry.store.url, grace, delete=delete))


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,5})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"grace {text!r} is not understood: write a number and s, m, h or d, as in 12h or 7d")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _print_table(report: "GcReport", *, delete: bool) -> None:
    """The largest orphans."""
    from rich.console import Console
    from rich.table import Table

    removed = set(report.removed)
    table = Table("orphan", "stored (UTC)")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for listed in sorted(report.orphans, key=lambda listed: (-listed.size, listed.path))[:MAX_ROWS]:
        fate = "removed" if listed in removed else "kept" if delete else "would be removed"
        table.add_row(listed.path.rsplit("/", 1)[-1], f"{listed.modified:%Y-%m-%d %H:%M}", f"{listed.size:,}", fate)
    if len(report.orphans) > MAX_ROWS:
        table.add_row(f"and {len(report.orphans) - MAX_ROWS:,} smaller ones", "", "", "")
    Console().print(table)


def _summary(report: "GcReport", url: str, grace: str, *, delete: bool) -> str:
    orphans = f"{len(report.orphans):,} orphans of {report.bytes:,} bytes"
    rest = f"{report.referenced:,} blobs are needed, {report.young:,} are held or younger than {grace}."
    if not delete:
        advice = " Nothing was removed: repeat with --delete." if report.orphans else ""
        return f"{url} has {orphans}; {rest}{advice}"
    freed = sum(listed.size for listed in report.removed)
    kept = len(report.orphans) - len(report.removed)
    return (
        f"Removed {len(report.removed):,} of {orphans} from {url}, {freed:,} bytes, and aborted "
        f"{report.aborted_uploads:,} unfinished uploads; {rest}"
        + (" Those kept were published meanwhile, or time ran out: repeat the command." if kept else "")
    )
