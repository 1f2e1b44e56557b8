"""Evaluations of a bundle as they lie in the store, and what follows from them: the gate before a promotion.

    evaluations/<bundle digest>/<evaluation digest>/summary.json    written last: without it there is none

A summary is read as plain JSON: what is written there belongs to workers.evaluation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infra.errors import IntegrityError, ObjectMissingError, RegistryError, UnknownRecordError
from infra.manifests import BundleRecord
from infra.registry import Registry
from infra.storage import Store

FOLDER = "evaluations"
SUMMARY = "summary.json"
# What two evaluations must share so that their figures may be compared.
SAME = ("base", "rewards", "prompts", "seeds", "steps", "guidance", "eta")


class PromotionError(RegistryError):
    """A promotion that the gate does not let pass."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One finished evaluation; `path` is its folder in the store."""

    digest: str
    path: str
    summary: dict[str, Any]

    @property
    def short(self) -> str:
        return self.digest[:12]

    @property
    def date(self) -> str:
        return str(self.summary["facts"]["date"])

    @property
    def hypervolumes(self) -> dict[str, dict[str, float]]:
        """Name of a front -> hypervolume, hypervolume_low, hypervolume_high."""
        return {row["front"]: row for row in self.summary["hypervolumes"] if row["front"] != "base"}


def evaluations_of(store: Store, bundle: BundleRecord) -> list[Evaluation]:
    """A bundle's finished evaluations, newest first. Raises IntegrityError for a damaged summary."""
    folder = f"{FOLDER}/{bundle.digest}"
    found = []
    for digest in store.folders(folder):
        path = f"{folder}/{digest}"
        try:
            summary = json.loads(store.read(f"{path}/{SUMMARY}"))
            evaluation = Evaluation(digest, path, summary)
            found.append((evaluation.date, evaluation))
        except ObjectMissingError:
            continue
        except (ValueError, KeyError, TypeError):
            raise IntegrityError(
                f"{store.url}/{path}/{SUMMARY} is damaged: delete the folder and evaluate {bundle.ref} again"
            ) from None
    return [evaluation for _, evaluation in sorted(found, key=lambda pair: pair[0], reverse=True)]


def evaluations_behind(registry: Registry, bundle: BundleRecord) -> list[Evaluation]:
    """The bundle's evaluations and those of its parents with the same adapters and sampler, newest first of each."""
    found = evaluations_of(registry.store, bundle)
    while bundle.parent:
        try:
            parent = registry.get_bundle(bundle.parent)
        except UnknownRecordError:
            break
        if (parent.adapters, parent.defaults, parent.base) != (bundle.adapters, bundle.defaults, bundle.base):
            break
        found += evaluations_of(registry.store, parent)
        bundle = parent
    return found


def choose(evaluations: Sequence[Evaluation], bundle: BundleRecord, digest: str | None = None) -> Evaluation:
    """The evaluation whose digest begins like this; the newest unless one is named. Raises PromotionError."""
    if not evaluations:
        raise PromotionError(
            f"bundle {bundle.ref} was never evaluated: first run `diffusion-blend evaluate RUN.toml --bundle "
            f"{bundle.ref}`"
        )
    matching = [one for one in evaluations if one.digest.startswith(digest or "")]
    if not matching:
        known = ", ".join(one.short for one in evaluations)
        raise PromotionError(f"bundle {bundle.ref} has no evaluation {digest!r}; it has: {known}")
    return matching[0]


def check_promotion(
    registry: Registry, bundle: BundleRecord, champion: BundleRecord | None, digest: str | None = None
) -> str:
    """What speaks for the promotion, in words. Raises PromotionError when the bundle was not evaluated, when the
    champion was not evaluated alike, or when a hypervolume fell below the champion's interval.
    """
    evaluation = choose(evaluations_behind(registry, bundle), bundle, digest)
    if champion is None or champion.digest == bundle.digest:
        return f"evaluation {evaluation.short}, no other champion to compare with"
    rivals = evaluations_behind(registry, champion)
    alike = next((rival for rival in rivals if _comparable(rival, evaluation)), None)
    if alike is None:
        raise PromotionError(
            f"no evaluation of the champion {champion.ref} asks what evaluation {evaluation.short} of {bundle.ref} "
            "asked: evaluate both with one run file, or use --force"
        )
    compared = []
    for front, ours in evaluation.hypervolumes.items():
        theirs = alike.hypervolumes.get(front)
        if theirs is None:
            continue
        figures = (
            f"{front} reaches a hypervolume of {ours['hypervolume']:.4g}, the champion {champion.ref} "
            f"{theirs['hypervolume']:.4g} ({theirs['hypervolume_low']:.4g} to {theirs['hypervolume_high']:.4g})"
        )
        if ours["hypervolume"] < theirs["hypervolume_low"]:
            raise PromotionError(f"{bundle.ref} is worse: {figures}. Promote another version, or use --force")
        compared.append(figures)
    if not compared:
        raise PromotionError(
            f"evaluation {evaluation.short} of {bundle.ref} and {alike.short} of {champion.ref} share no method: "
            "evaluate both with one run file, or use --force"
        )
    return f"evaluation {evaluation.short}: " + "; ".join(compared)


def _comparable(one: Evaluation, other: Evaluation) -> bool:
    return all(one.summary["facts"].get(fact) == other.summary["facts"].get(fact) for fact in SAME)
