"""How near methods come to oracles: models retrained for exactly the preference that the others serve untrained.

An oracle's preference is its weights together with its strength. share_of_oracle = weighted gain / the oracle's
weighted gain, with the gains of shares.py; undefined (NaN) where the oracle's is not clearly positive. All
comparisons are paired: the same prompts, seeds and resamples on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from blend.metrics import Interval, interval
from workers.evaluation.grid import ORACLE, Cell
from workers.evaluation.shares import UNDEFINED, Shares, by_method, common, named, ratio, served

REFERENCE = "mpa"
# Figures of a rival that are plain means over its cells; the last only where a judge looked at the images.
MEANS = ("rows", "decodes", "gradients", "seconds", "memory_mb", "diversity", "path_kl", "binding_right")


def oracle_columns(basis: Sequence[str]) -> list[str]:
    """The columns of the table of oracles, which an evaluation without oracles has as well."""
    return [
        *("cell", "method", *(f"w_{name}" for name in basis), "kl_lambda"),
        *(*_spanned("weighted_gain"), "oracle_gain", *_spanned("share_of_oracle"), *_spanned("gap")),
        *("rows", "path_kl", "oracle_path_kl"),
    ]


def rival_columns(*, judged: bool = False) -> list[str]:
    """The columns of the table of rivals, which an evaluation without oracles has as well."""
    means = MEANS if judged else MEANS[:-1]
    return ["method", "preferences", *_spanned("share_of_oracle"), *_spanned("difference"), "failed", *means]


def oracle_table(cells: Sequence[Cell], basis: Sequence[str], shares: Shares, summary: pd.DataFrame) -> pd.DataFrame:
    """One row per cell at whose preference there is an oracle, itself included; preference by preference."""
    records = summary.to_dict("records")
    rows: list[dict[str, Any]] = []
    for oracle, cell in enumerate(cells):
        if cell.method != ORACLE:
            continue
        best, best_draws = shares.gain([oracle])
        for index in (index for index, other in enumerate(cells) if served(other) == served(cell)):
            rows.append(
                {
                    **records[index],
                    "oracle_gain": best,
                    **named("share_of_oracle", ratio(*shares.gain([index]), best, best_draws, shares.level)),
                    **named("gap", interval(*shares.lead([(index, oracle)]), shares.level)),
                    "oracle_path_kl": records[oracle]["path_kl"],
                }
            )
    return pd.DataFrame(rows, columns=oracle_columns(basis))


def rival_table(cells: Sequence[Cell], shares: Shares, summary: pd.DataFrame) -> pd.DataFrame:
    """One row per method, over those of the oracles' preferences at lambda 1 that it was measured at.

    `difference` is the weighted gain above that of DB-MPA, averaged over those of them that both were measured at.
    """
    members = by_method(cells)
    rows: list[dict[str, Any]] = []
    for method, measured in members.items():
        pairs = common(cells, measured, members.get(ORACLE, []))
        if not pairs:
            continue
        mine, oracles = (list(side) for side in zip(*pairs, strict=True))
        both = [] if method == REFERENCE else common(cells, mine, members.get(REFERENCE, []))
        rows.append(
            {
                "method": method,
                "preferences": len(mine),
                **named("share_of_oracle", ratio(*shares.gain(mine), *shares.gain(oracles), shares.level)),
                **named("difference", _difference(shares, both)),
                "failed": summary["failed"].iloc[mine].sum(),
                **{name: summary[name].iloc[mine].mean() for name in MEANS if name in summary},
            }
        )
    return pd.DataFrame(rows, columns=rival_columns(judged="binding_right" in summary))


def _difference(shares: Shares, pairs: Sequence[tuple[int, int]]) -> Interval:
    """Mean weighted gain of the first of each pair above that of the second."""
    if not pairs:
        return UNDEFINED
    lead, draws = shares.lead(pairs)
    return interval(lead / len(pairs), draws / len(pairs), shares.level)


def _spanned(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"
