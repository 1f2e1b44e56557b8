"""Where a record comes from and what was made of it: base -> run -> adapter -> bundle -> evaluations, as a tree."""

from dataclasses import dataclass, field

from infra.evaluations import evaluations_of
from infra.manifests import AdapterRecord, BundleRecord, Record
from infra.registry import Registry
from infra.storage import Store


@dataclass(frozen=True, slots=True)
class Node:
    """One thing in words, and what was made of it. `chosen` marks the record that was asked for."""

    text: str
    chosen: bool = False
    children: list["Node"] = field(default_factory=list)


def lineage(registry: Registry, record: Record, evaluations: Store | None = None) -> Node:
    """The tree around a record, from its base model on. `evaluations`: the store that they lie in, if another.

    For an adapter, all bundles of the registry that hold it; for a bundle, all its adapters.
    """
    store = evaluations or registry.store
    if isinstance(record, AdapterRecord):
        adapters = [record]
        bundles = [bundle for bundle in _bundles(registry) if _holds(bundle, record)]
    else:
        adapters, bundles = list(registry.adapters_of(record).values()), [record]
    root = Node(f"base {record.base.source} (hash {record.base.sha256[:12]})")
    for adapter in adapters:
        made = Node(f"adapter {adapter.ref}: {adapter.reward}, rank {adapter.rank}", chosen=adapter is record)
        root.children.append(Node(_run(adapter), children=[made]))
        made.children.extend(_bundle(registry, store, one, record) for one in bundles if _holds(one, adapter))
    return root


def _run(adapter: AdapterRecord) -> str:
    if adapter.kl_weight is None:
        return "trained elsewhere"
    known = [f"{system} {run}" for system, run in adapter.run_ids.items()]
    known += [f"code {adapter.git_commit[:12]}"] if adapter.git_commit else []
    target = f", KL target {adapter.kl_target:g} nats" if adapter.kl_target else ""
    return f"run {', '.join(known) or 'unnamed'}: KL weight {adapter.kl_weight:.4g}{target}, seed {adapter.seed}"


def _bundle(registry: Registry, store: Store, bundle: BundleRecord, asked: Record) -> Node:
    aliases = [name for name, entry in registry.aliases(bundle.name).items() if entry.version == bundle.version]
    origin = f", made from {bundle.parent}" if bundle.parent else ""
    known = f" ({', '.join(aliases)})" if aliases else ""
    children = [
        Node(f"evaluation {one.short} of {one.date}: {' '.join(one.summary.get('headline', [])[:1])}".rstrip(": "))
        for one in evaluations_of(store, bundle)
    ]
    return Node(f"bundle {bundle.ref}{known}{origin}", chosen=bundle is asked, children=children)


def _bundles(registry: Registry) -> list[BundleRecord]:
    return [one for name in registry.names() for one in registry.versions(name) if isinstance(one, BundleRecord)]


def _holds(bundle: BundleRecord, adapter: AdapterRecord) -> bool:
    return adapter.digest in {link.digest for link in bundle.adapters.values()}
