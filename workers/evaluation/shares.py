"""How much of the adapters' own gains a blend keeps.

share = sum_i w_i g_i(cell) / sum_i w_i g_i(adapter i alone), where g_i is the gain over the base in adapter i's own
reward, in base standard deviations. 1 means that every weighted reward is as good as in the model tuned for it alone,
which conflicting rewards do not allow. Undefined (NaN) where the adapters' gain is not clearly positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blend.metrics import Interval, interval
from workers.evaluation.grid import ADAPTER, BASE, Cell

Array = NDArray[np.float64]
UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


def named(name: str, found: Interval) -> dict[str, float]:
    """An interval as three columns: name, name_low, name_high."""
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


class Shares:
    """Weighted gains of all cells (base first, then the K adapters), from normalised means and their draws."""

    def __init__(self, mean: Array, draws: Array, cells: Sequence[Cell], own: Sequence[int], level: float) -> None:
        """mean [cells, objectives] and draws [resamples, cells, objectives]; own[i] is adapter i's objective."""
        self._cells, self._level = cells, level
        self._weights = np.asarray([cell.weights for cell in cells])  # [cells, K]
        self._gain, self._best = self._weigh(mean, own)
        self._gain_draws, self._best_draws = self._weigh(draws, own)
        adapters = slice(1, 1 + len(own))
        gains = mean[adapters][:, own] - mean[0, own]
        self._switch = ((self._weights @ gains) * self._weights).sum(axis=1)

    def _weigh(self, values: Array, own: Sequence[int]) -> tuple[Array, Array]:
        gains = values[..., own] - values[..., :1, own]  # [..., cells, K]
        alone = np.diagonal(gains[..., 1 : 1 + len(own), :], axis1=-2, axis2=-1)  # [..., K]
        return (gains * self._weights).sum(axis=-1), alone @ self._weights.T

    def of_cell(self, index: int) -> dict[str, float]:
        """weighted_gain and share with intervals; switch_share: what one adapter per image, drawn by w, would keep."""
        if self._cells[index].method == BASE:
            return {**named("weighted_gain", UNDEFINED), **named("share", UNDEFINED), "switch_share": float("nan")}
        gain = interval(self._gain[index], self._gain_draws[:, index], self._level)
        share = self._ratio([index])
        switch = self._switched([index]) if share is not UNDEFINED else float("nan")
        return {**named("weighted_gain", gain), **named("share", share), "switch_share": switch}

    def overall(self) -> pd.DataFrame:
        """One row per method: its share over all preferences at lambda 1, and the paired difference to the first."""
        members: dict[str, list[int]] = {}
        for index, cell in enumerate(self._cells):
            if cell.method not in (BASE, ADAPTER) and cell.kl_lambda == 1:
                members.setdefault(cell.method, []).append(index)
        rows = []
        for method, picked in members.items():
            share, first = self._ratio(picked), next(iter(members.values()))
            difference = UNDEFINED
            if share is not UNDEFINED and picked is not first:
                mine, other = self._ratio_draws(picked), self._ratio_draws(first)
                difference = interval(mine[0] - other[0], mine[1] - other[1], self._level)
            rows.append(
                {
                    "method": method,
                    "preferences": len(picked),
                    **named("share", share),
                    **named("difference", difference),
                    "switch_share": float("nan")
                    if share is UNDEFINED
                    else self._switch[picked].sum() / self._best[picked].sum(),
                }
            )
        return pd.DataFrame(rows)

    def _switched(self, picked: Sequence[int]) -> float:
        return float(self._switch[picked].sum() / self._best[picked].sum())

    def _ratio_draws(self, picked: Sequence[int]) -> tuple[float, Array]:
        best, best_draws = self._best[picked].sum(), self._best_draws[:, picked].sum(axis=1)
        return float(self._gain[picked].sum() / best), self._gain_draws[:, picked].sum(axis=1) / best_draws

    def _ratio(self, picked: Sequence[int]) -> Interval:
        best, best_draws = self._best[picked].sum(), self._best_draws[:, picked].sum(axis=1)
        if best <= 0 or interval(best, best_draws, self._level).low <= 0:
            return UNDEFINED
        return interval(*self._ratio_draws(picked), self._level)
