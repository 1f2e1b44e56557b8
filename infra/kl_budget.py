"""Whether the adapters of a bundle depart equally far from their base, which blending them assumes."""

from collections.abc import Mapping

from infra.manifests import AdapterRecord

# Held-out path KL moves by tens of per cent between evaluations of one run; a factor of two is another strength.
CLEARLY = 2.0


def kl_difference(adapters: Mapping[str, AdapterRecord]) -> str | None:
    """Adapters {basis name: record} of clearly different KL, in words with the figures; None where there are none.

    Compared is the path KL where every adapter has one measured, else the KL weight in training. What is known of no
    adapter, as of an imported one, is said too.
    """
    unknown = [basis for basis, adapter in adapters.items() if _figures(adapter) == (None, None)]
    if unknown:
        return (
            f"nothing is known of the KL of {', '.join(unknown)}: look at images of every mix before relying on the "
            "weights"
        )
    for index, (what, unit) in enumerate((("path KL", " nats"), ("KL weight", ""))):
        found = {basis: figure for basis, adapter in adapters.items() if (figure := _figures(adapter)[index])}
        if len(found) < len(adapters):
            continue
        if max(found.values()) <= CLEARLY * min(found.values()):
            return None
        listed = ", ".join(f"{basis} {figure:.4g}{unit}" for basis, figure in sorted(found.items()))
        return (
            f"the adapters were trained to clearly different KL ({what}: {listed}), so that equal weights do not mean "
            "equal strength: train them with one kl_weight and one kl_target"
        )
    return None


def _figures(adapter: AdapterRecord) -> tuple[float | None, float | None]:
    """Path KL in nats and KL weight, as far as they are known and say anything."""
    path_kl = adapter.metrics.get("path_kl")
    return (path_kl.value or None) if path_kl else None, adapter.kl_weight or None
