"""`diffusion-blend registry ...`: what changes a registry, or takes something in or out of it."""

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_registry import AdapterOption, Ref, StoreOption, kind_of, registry_app, registry_at, settings_at
from flows.events import REGISTERED, announce, registration
from flows.transfer_bar import transfer_bar

if TYPE_CHECKING:
    from infra.manifests import AliasEntry

CHAMPION = "champion"
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the alias's history.")]
ActorOption = Annotated[str, typer.Option("--actor", help="Who; your user name unless given.")]
EvaluationOption = Annotated[
    str, typer.Option("--evaluation", help="How its digest begins; the bundle's newest unless given.")
]


@registry_app.command()
def promote(
    ref: Ref,
    reason: ReasonOption,
    alias: AliasOption = "champion",
    actor: ActorOption = "",
    adapter: AdapterOption = False,
    evaluation: EvaluationOption = "",
    force: Annotated[bool, typer.Option("--force", help="Promote without asking the evaluations.")] = False,
    store: StoreOption = "",
) -> None:
    """Point an alias at a version. A bundle's champion must have been evaluated, and not as worse than the last one."""
    registry, kind = registry_at(store), kind_of(adapter)
    record = registry.get(ref, kind)
    if record.kind == "bundle" and alias == CHAMPION and not force:
        from infra.evaluations import champion_of, check_promotion

        found = check_promotion(registry, record, champion_of(registry, record.name), evaluation or None)
        reason = f"{reason}; {found}"
    elif force:
        reason = f"{reason}; forced"
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
    registry = registry_at(store)
    entry = registry.rollback(name, alias, actor=actor or getpass.getuser(), reason=reason, kind=kind_of(adapter))
    _report(name, alias, entry)


@registry_app.command()
def tag(
    ref: Ref,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="A new name, such as release-1.")],
    reason: ReasonOption,
    actor: ActorOption = "",
    adapter: AdapterOption = False,
    store: StoreOption = "",
) -> None:
    """Give a version a name that never moves."""
    registry, kind = registry_at(store), kind_of(adapter)
    record = registry.get(ref, kind)
    _report(
        record.name,
        tag,
        registry.tag(record.name, record.version, tag, actor=actor or getpass.getuser(), reason=reason, kind=kind),
    )


@registry_app.command()
def recommend(ref: Ref, evaluation: EvaluationOption = "", store: StoreOption = "") -> None:
    """Publish a bundle again, with the weights and lambda that an evaluation of it speaks for."""
    from workers.basis import recommend as publish_ranges

    record = publish_ranges(ref, evaluation or None, settings_at(store).store_url)
    announce(REGISTERED, record.ref, registration(record, registry_at(store).store.url))
    spans = (f"{name} {span.low:g} to {span.high:g}" for name, span in record.weight_ranges.items())
    limits = record.lambda_range
    typer.echo(f"{record.ref}: weights {', '.join(spans)}; lambda {limits.low:g} to {limits.high:g}")


@registry_app.command("import")
def import_(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(help="A LoRA of diffusers, peft or kohya: a file, or a directory with one.")],
    base: Annotated[str, typer.Option(help="The base it was trained on: a diffusers directory or Hub id.")],
    reward: Annotated[str, typer.Option(help="What it was tuned toward, if that is known.")] = "not known",
    licence: Annotated[str, typer.Option(help="The terms it may be used on.")] = "",
    store: StoreOption = "",
) -> None:
    """Take a LoRA that was trained elsewhere in as an adapter, once it has been loaded into its base."""
    from workers.importing import import_adapter

    record = import_adapter(registry_at(store), name, path, base=base, reward=reward, licence=licence or None)
    layers = ", ".join(record.target_modules)
    typer.echo(f"Published {record.ref}: rank {record.rank}, alpha {record.alpha:g}, on {layers}")


@registry_app.command()
def bundle(
    name: NameArgument,
    adapters: Annotated[list[str], typer.Argument(metavar="[BASIS=]ADAPTER...", help="As colourfulness or vivid=a@3.")],
    guidance_scale: Annotated[float, typer.Option(min=0, help="Served unless a request says otherwise.")],
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps, likewise.")],
    store: StoreOption = "",
) -> None:
    """Join published adapters of one base into a bundle, the unit that is served; `promote` it next."""
    from infra.kl_budget import kl_difference
    from infra.manifests import BundleDefaults

    registry = registry_at(store)
    named = (text.rpartition("=") for text in adapters)
    records = {basis or ref.partition("@")[0]: registry.get_adapter(ref) for basis, _, ref in named}
    if len(records) < len(adapters):
        raise typer.BadParameter(f"{' '.join(adapters)} names a basis twice: write BASIS=ADAPTER with distinct names")
    defaults = BundleDefaults(guidance_scale=guidance_scale, num_inference_steps=steps)
    if flag := kl_difference(records):
        typer.echo(f"Warning: {flag}", err=True)
    base = next(iter(records.values())).base
    record = registry.publish_bundle(name, base, records, defaults=defaults)
    typer.echo(f"Published {record.ref}")
    announce(REGISTERED, record.ref, registration(record, registry.store.url))


@registry_app.command()
def export(
    ref: Ref,
    directory: Annotated[Path, typer.Argument(help="A new directory.")],
    adapter: AdapterOption = False,
    kohya: Annotated[
        bool, typer.Option("--kohya", help="Single files for ComfyUI and A1111, which only approximate the blend.")
    ] = False,
    store: StoreOption = "",
) -> None:
    """Write an adapter, or every adapter of a bundle, as diffusers LoRA directories or as kohya's single files."""
    from infra.export import export as to_directories
    from workers.bundles import find_record

    registry, record = find_record(ref, settings_at(store), kind_of(adapter))
    if kohya:
        from workers.exporting import export_kohya as write
    else:
        write = to_directories
    adapters = [record] if record.kind == "adapter" else registry.adapters_of(record).values()
    total = sum(file.size for adapter in adapters for file in adapter.files)
    with transfer_bar("Fetching") as moved:
        registry.store.on_bytes = lambda more: moved(more, total)
        written = write(registry, record, directory)
    typer.echo(f"{record.ref} is in {written}")


def _report(name: str, alias: str, entry: "AliasEntry") -> None:
    typer.echo(f"{name}@{alias} is version {entry.version} (move {entry.seq} by {entry.actor}: {entry.reason})")
