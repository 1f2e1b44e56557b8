"""`diffusion-blend registry ...`: look at what is stored, and check a store. What changes it is in cli_lifecycle."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_gc import gc

if TYPE_CHECKING:
    from infra.manifests import Kind, Record
    from infra.registry import Registry
    from infra.settings import Settings

Ref = Annotated[str, typer.Argument(help="NAME for the newest, NAME@VERSION or NAME@ALIAS.")]
AdapterOption = Annotated[bool, typer.Option("--adapter", help="NAME is an adapter, not a bundle.")]
StoreOption = Annotated[
    str, typer.Option("--store", help="file:// or s3:// URL; DIFFUSION_BLEND_STORE_URL unless given.")
]

registry_app = typer.Typer(
    help="Look at, promote, check, clean and export what is stored.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    # It adds its commands to the same group.
    from flows import cli_lifecycle  # noqa: F401

    registry_app.command("gc")(gc)
    app.add_typer(registry_app, name="registry")


@registry_app.command("list")
def list_names(store: StoreOption = "") -> None:
    """Show adapters and bundles, in your store and in the package, with their versions and aliases."""
    from rich.console import Console
    from rich.table import Table

    from workers.bundles import shipped_registry

    own = registry_at(store)
    table = Table("kind", "name", "versions", "aliases", "what it is", "where")
    for registry in filter(None, (own, shipped_registry())):
        for row in _rows(registry):
            table.add_row(*row)
    if not table.row_count:
        typer.echo(f"Nothing is stored in {own.store.url} yet: train an adapter, or run the demo.")
        return
    Console().print(table)


@registry_app.command()
def show(
    ref: Ref,
    adapter: AdapterOption = False,
    tree: Annotated[bool, typer.Option("--tree", help="From the base model to evaluations, instead.")] = False,
    store: StoreOption = "",
) -> None:
    """Print a manifest as JSON, with the history of every alias of its name; or where it comes from, as a tree."""
    from workers.bundles import find_record

    kind = kind_of(adapter)
    registry, record = find_record(ref, settings_at(store), kind)
    if tree:
        _print_tree(registry, record, store)
        return
    histories = {
        alias: [entry.model_dump(mode="json") for entry in registry.history(record.name, alias, kind)]
        for alias in registry.alias_names(record.name, kind)
    }
    document = {"manifest": record.model_dump(mode="json"), "aliases": histories}
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@registry_app.command()
def doctor(store: StoreOption = "") -> None:
    """Check that the store honours conditional writes, and that everything in it is whole."""
    from rich.console import Console

    from infra.doctor import examine
    from infra.errors import IntegrityError

    registry = registry_at(store)
    with Console(stderr=True).status("") as status:
        findings = examine(registry, lambda what: status.update(f"looking at {what}"))
    for finding in findings:
        typer.echo(f"{finding.where}: {finding.problem}")
    if findings:
        raise IntegrityError(f"{len(findings)} problem(s) in {registry.store.url}: see the lines above")
    typer.echo(f"{registry.store.url} is sound.")


def _print_tree(registry: "Registry", record: "Record", store: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    from infra.lineage import Node, lineage

    def grow(node: Node, tree: Tree) -> Tree:
        for child in node.children:
            text = escape(child.text)
            grow(child, tree.add(f"[bold]{text}[/bold]" if child.chosen else text))
        return tree

    root = lineage(registry, record, registry_at(store).store)
    Console().print(grow(root, Tree(escape(root.text))))


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


def kind_of(adapter: bool) -> "Kind":
    return "adapter" if adapter else "bundle"


def settings_at(store: str) -> "Settings":
    from infra.settings import read_settings

    settings = read_settings()
    return settings.model_copy(update={"store_url": store}) if store else settings


def registry_at(store: str) -> "Registry":
    from infra.registry import Registry
    from infra.storage import open_store

    settings = settings_at(store)
    return Registry(open_store(settings.store_url, settings))
