"""`diffusion-blend registry ...`: look at what is stored, move aliases, check and clean a store, export adapters."""

import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_gc import gc

if TYPE_CHECKING:
    from infra.manifests import AliasEntry, Kind, Record
    from infra.registry import Registry
    from infra.settings import Settings

Ref = Annotated[str, typer.Argument(help="NAME for the newest, NAME@VERSION or NAME@ALIAS.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the alias's history.")]
ActorOption = Annotated[str, typer.Option("--actor", help="Who; your user name unless given.")]
AdapterOption = Annotated[bool, typer.Option("--adapter", help="NAME is an adapter, not a bundle.")]
StoreOption = Annotated[
    str, typer.Option("--store", help="file:// or s3:// URL; DIFFUSION_BLEND_STORE_URL unless given.")
]

registry_app = typer.Typer(
    help="Look at, promote, check, clean and export what is stored.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    registry_app.command("gc")(gc)
    app.add_typer(registry_app, name="registry")


@registry_app.command("list")
def list_names(store: StoreOption = "") -> None:
    """Show adapters and bundles, in your store and in the package, with their versions and aliases."""
    from rich.console import Console
    from rich.table import Table

    from workers.bundles import shipped_registry

    own = _registry(_settings(store))
    table = Table("kind", "name", "versions", "aliases", "what it is", "where")
    for registry in filter(None, (own, shipped_registry())):
        for row in _rows(registry):
            table.add_row(*row)
    if not table.row_count:
        typer.echo(f"Nothing is stored in {own.store.url} yet: train an adapter, or run the demo.")
        return
    Console().print(table)


@registry_app.command()
def show(ref: Ref, adapter: AdapterOption = False, store: StoreOption = "") -> None:
    """Print a manifest as JSON, with the history of every alias of its name."""
    from workers.bundles import find_record

    kind = _kind(adapter)
    registry, record = find_record(ref, _settings(store), kind)
    histories = {
        alias: [entry.model_dump(mode="json") for entry in registry.history(record.name, alias, kind)]
        for alias in registry.alias_names(record.name, kind)
    }
    document = {"manifest": record.model_dump(mode="json"), "aliases": histories}
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@registry_app.command()
def promote(
    ref: Ref,
    reason: ReasonOption,
    alias: AliasOption = "champion",
    actor: ActorOption = "",
    adapter: AdapterOption = False,
    store: StoreOption = "",
) -> None:
    """Point an alias at a version."""
    registry, kind = _registry(_settings(store)), _kind(adapter)
    record = registry.get(ref, kind)
    entry = registry.promote(
        record.name, record.version, alias, actor=actor or getpass.getuser(), reason=reason, kind=kind
    )
    _report(record.name, alias, entry)


@registry_app.command()
def rollback(
    name: NameArgument,
    reason: ReasonOption,
    alias: AliasOption = "champion",
    actor: ActorOption = "",
    adapter: AdapterOption = False,
    store: StoreOption = "",
) -> None:
    """Point an alias back at the version before."""
    registry = _registry(_settings(store))
    entry = registry.rollback(name, alias, actor=actor or getpass.getuser(), reason=reason, kind=_kind(adapter))
    _report(name, alias, entry)


@registry_app.command()
def bundle(
    name: NameArgument,
    adapters: Annotated[list[str], typer.Argument(metavar="[BASIS=]ADAPTER...", help="As colourfulness or vivid=a@3.")],
    guidance_scale: Annotated[float, typer.Option(min=0, help="Served unless a request says otherwise.")],
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps, likewise.")],
    store: StoreOption = "",
) -> None:
    """Join published adapters of one base into a bundle, the unit that is served; `promote` it next."""
    from infra.manifests import BundleDefaults

    registry = _registry(_settings(store))
    named = (text.rpartition("=") for text in adapters)
    records = {basis or ref.partition("@")[0]: registry.get_adapter(ref) for basis, _, ref in named}
    if len(records) < len(adapters):
        raise typer.BadParameter(f"{' '.join(adapters)} names a basis twice: write BASIS=ADAPTER with distinct names")
    defaults = BundleDefaults(guidance_scale=guidance_scale, num_inference_steps=steps)
    base = next(iter(records.values())).base
    typer.echo(f"Published {registry.publish_bundle(name, base, records, defaults=defaults).ref}")


@registry_app.command()
def doctor(store: StoreOption = "") -> None:
    """Check that the store honours conditional writes, and that everything in it is whole."""
    from rich.console import Console

    from infra.doctor import examine
    from infra.errors import IntegrityError

    registry = _registry(_settings(store))
    with Console(stderr=True).status("") as status:
        findings = examine(registry, lambda what: status.update(f"looking at {what}"))
    for finding in findings:
        typer.echo(f"{finding.where}: {finding.problem}")
    if findings:
        raise IntegrityError(f"{len(findings)} problem(s) in {registry.store.url}: see the lines above")
    typer.echo(f"{registry.store.url} is sound.")


@registry_app.command()
def export(
    ref: Ref,
    directory: Annotated[Path, typer.Argument(help="A new directory.")],
    adapter: AdapterOption = False,
    store: StoreOption = "",
) -> None:
    """Write an adapter, or every adapter of a bundle, as diffusers LoRA directories."""
    from infra.export import export as write
    from workers.bundles import find_record

    registry, record = find_record(ref, _settings(store), _kind(adapter))
    typer.echo(f"{record.ref} is in {write(registry, record, directory)}")


def _rows(registry: "Registry") -> list[tuple[str, ...]]:
    from infra.registry import KINDS

    where = "the package" if registry.read_only else registry.store.url
    rows: list[tuple[str, ...]] = []
    for kind in KINDS:
        for name in registry.names(kind):
            newest = registry.get(name, kind)
            aliases = (f"{alias} -> {entry.version}" for alias, entry in registry.aliases(name, kind).items())
            rows.append((kind, name, str(newest.version), ", ".join(aliases), _summary(newest), where))
    return rows


def _summary(record: "Record") -> str:
    if record.kind == "bundle":
        return f"{', '.join(record.adapters)} on {record.base.source}"
    return f"{record.reward} on {record.base.source}, rank {record.rank}"


def _report(name: str, alias: str, entry: "AliasEntry") -> None:
    typer.echo(f"{name}@{alias} is version {entry.version} (move {entry.seq} by {entry.actor}: {entry.reason})")


def _kind(adapter: bool) -> "Kind":
    return "adapter" if adapter else "bundle"


def _settings(store: str) -> "Settings":
    from infra.settings import read_settings

    settings = read_settings()
    return settings.model_copy(update={"store_url": store}) if store else settings


def _registry(settings: "Settings") -> "Registry":
    from infra.registry import Registry
    from infra.storage import open_store

    return Registry(open_store(settings.store_url, settings))
