"""Evaluations of a bundle as they lie in the store, which of them is to be compared with, and the gate before a
promotion.

    evaluations/<bundle digest>/<evaluation digest>/summary.json    written last: without it there is none

A summary is read as plain JSON: what is written there belongs to workers.evaluation.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infra.comparing import REGRESSION, WORSE, common_fronts, decide, in_words, mean_and_interval
from infra.errors import IntegrityError, ObjectMissingError, RegistryError, UnknownRecordError
from infra.manifests import BundleRecord
from infra.registry import Registry
from infra.storage import Store

FOLDER = "evaluations"
SUMMARY = "summary.json"
# What two evaluations must share so that their figures may be compared.
SAME = ("base", "rewards", "prompts", "seeds", "steps", "guidance", "eta")
SAME_CONFIG = ("height", "width", "reference_sds")
CHAMPION = "champion"


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


def bundle_folder(bundle_digest: str) -> str:
    """Where a bundle's evaluations lie, each in a folder of its own, and beside them what they share."""
    return f"{FOLDER}/{bundle_digest}"


def evaluations_of(store: Store, bundle: BundleRecord) -> list[Evaluation]:
    """A bundle's finished evaluations, newest first. Raises IntegrityError for a damaged summary."""
    folder = bundle_folder(bundle.digest)
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


def evaluations_behind(registry: Registry, bundle: BundleRecord, own: Store | None = None) -> list[Evaluation]:
    """The bundle's evaluations and those of its parents with the same adapters and sampler, newest first of each.

    `own`: another store to look in as well, for a bundle of the package is evaluated into the user's.
    """
    stores = {store.url: store for store in (own, registry.store) if store is not None}
    found = [one for store in stores.values() for one in evaluations_of(store, bundle)]
    while bundle.parent:
        try:
            parent = registry.get_bundle(bundle.parent)
        except UnknownRecordError:
            break
        if (parent.adapters, parent.defaults, parent.base) != (bundle.adapters, bundle.defaults, bundle.base):
            break
        found += [one for store in stores.values() for one in evaluations_of(store, parent)]
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
    champion was not evaluated alike, or when it is a regression: a hypervolume fell below the champion's
    interval.

    infra.comparing decides that, of the same fronts as for the verdict of a comparison.
    """
    evaluation = choose(evaluations_behind(registry, bundle), bundle, digest)
    if champion is None or champion.digest == bundle.digest:
        return f"evaluation {evaluation.short}, no other champion to compare with"
    alike = [rival for rival in evaluations_behind(registry, champion) if comparable(rival, evaluation)]
    if not alike:
        raise PromotionError(
            f"no evaluation of the champion {champion.ref} asks what evaluation {evaluation.short} of {bundle.ref} "
            "asked: evaluate both with one run file, or use --force"
        )
    found = [fronts for rival in alike if (fronts := common_fronts(evaluation.summary, rival.summary))]
    if not found:
        raise PromotionError(
            f"evaluation {evaluation.short} of {bundle.ref} and {alike[0].short} of {champion.ref} share no method: "
            "evaluate both with one run file, or use --force"
        )
    if decide(found[0]) == REGRESSION:
        worse = [line for line in found[0] if line["verdict"] == WORSE]
        raise PromotionError(
            f"{bundle.ref} is worse: {_compared(worse, champion)}. Promote another version, or use --force"
        )
    return f"evaluation {evaluation.short}: {_compared(found[0], champion)}"


def _compared(fronts: Sequence[dict[str, Any]], champion: BundleRecord) -> str:
    return "; ".join(
        f"{line['front']} reaches a hypervolume of {mean_and_interval(line['now'])[0]}, the champion {champion.ref} "
        f"{in_words(line['then'])}"
        for line in fronts
    )


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether both answer the same question, in the same units."""
    facts, others = one.summary["facts"], other.summary["facts"]
    config, configs = (evaluation.summary.get("config", {}) for evaluation in (one, other))
    # hypervolumes are over the rewards that adapters were tuned for
    axes, other_axes = (set(known.get("adapters", {}).values()) for known in (facts, others))
    same = all(facts.get(fact) == others.get(fact) for fact in SAME) and _same_units(one.summary, other.summary)
    return same and axes == other_axes and all(config.get(key) == configs.get(key) for key in SAME_CONFIG)


def _same_units(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether rewards are counted in the same deviations, but for another processor's rounding."""
    ours, theirs = one.get("scales", {}), other.get("scales", {})
    return all(math.isclose(ours[name]["sd"], theirs[name]["sd"], rel_tol=1e-3) for name in ours.keys() & theirs.keys())


def champion_of(registry: Registry, name: str, alias: str = CHAMPION) -> BundleRecord | None:
    """What the alias points at; None when it was never set."""
    return registry.get_bundle(f"{name}@{alias}") if alias in registry.alias_names(name) else None


@dataclass(frozen=True, slots=True)
class Earlier:
    """The evaluation to compare with, the bundle it stands for, and what that is to the one at hand."""

    evaluation: Evaluation
    bundle: BundleRecord
    role: str


def earlier_evaluation(
    registry: Registry, bundle: BundleRecord, evaluation: Evaluation, own: Store | None = None
) -> Earlier | None:
    """What to hold an evaluation of `bundle` against: the champion's newest comparable one.

    For the champion itself, its own comparable one before this, else that of the champion before it: then a difference
    is a drift. `own` is as in evaluations_behind. Raises IntegrityError for a damaged summary.
    """
    for record, role in _predecessors(registry, bundle):
        for one in evaluations_behind(registry, record, own):
            later = record.digest == bundle.digest and one.date > evaluation.date
            if one.digest == evaluation.digest or later or not comparable(one, evaluation):
                continue
            if common_fronts(evaluation.summary, one.summary):
                return Earlier(one, record, role)
    return None


def _predecessors(registry: Registry, bundle: BundleRecord) -> Iterator[tuple[BundleRecord, str]]:
    champion = champion_of(registry, bundle.name)
    if champion is None:
        return
    if champion.digest != bundle.digest:
        yield champion, "the champion"
        return
    yield bundle, "the champion, evaluated before"
    for entry in reversed(registry.history(bundle.name, CHAMPION)):
        if entry.digest != bundle.digest:
            yield registry.get_bundle(f"{bundle.name}@{entry.version}"), "the champion before it"
            return
