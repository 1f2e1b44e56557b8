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
from blend.preference import METHODS
from workers.evaluation.grid import ADAPTER, BASE, Cell

Array = NDArray[np.float64]
_DIGITS = 6
UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


def named(name: str, found: Interval) -> dict[str, float]:
    """An interval as three columns: name, name_low, name_high."""
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def ratio(value: float, draws: Array, whole: float, whole_draws: Array, level: float) -> Interval:
    """value / whole with paired draws; UNDEFINED where the whole is not clearly positive."""
    if whole <= 0 or interval(whole, whole_draws, level).low <= 0:
        return UNDEFINED
    # a resample of prompts at which nothing was gained has no ratio
    some = whole_draws != 0
    return interval(value / whole, draws[some] / whole_draws[some], level)


class Shares:
    """Weighted gains of all cells (base first, then the K adapters), from normalised means and their draws."""

    def __init__(self, mean: Array, draws: Array, cells: Sequence[Cell], own: Sequence[int], level: float) -> None:
        """mean [cells, objectives] and draws [resamples, cells, objectives]; own[i] is adapter i's objective."""
        self._cells, self.level = cells, level
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
        gain = interval(*self.gain([index]), self.level)
        share = self._ratio([index])
        switch = self._switched([index]) if share is not UNDEFINED else float("nan")
        return {**named("weighted_gain", gain), **named("share", share), "switch_share": switch}

    def gain(self, picked: Sequence[int]) -> tuple[float, Array]:
        """Sum of these cells' weighted gains, and its bootstrap draws."""
        return float(self._gain[picked].sum()), self._gain_draws[:, picked].sum(axis=1)

    def lead(self, pairs: Sequence[tuple[int, int]]) -> tuple[float, Array]:
        """Sum over pairs of the first cell's weighted gain above the second's, and its bootstrap draws."""
        (mine, draws), (theirs, their_draws) = (self.gain([pair[side] for pair in pairs]) for side in (0, 1))
        return mine - theirs, draws - their_draws

    def overall(self) -> pd.DataFrame:
        """One row per method: its share over its own preferences at lambda 1, and the difference to the first method.

        The first is the engine's first method, whatever stands before it. The difference is paired, and over the
        preferences that both have: where those are not all, it is not that of the two shares.
        """
        members = by_method(self._cells)
        order = sorted(members, key=lambda method: method not in METHODS)
        rows = []
        for method in order:
            picked, share = members[method], self._ratio(members[method])
            difference = UNDEFINED if method == order[0] else self._difference(picked, members[order[0]])
            rows.append(
                {
                    "method": method,
                    "preferences": len(picked),
                    **named("share", share),
                    **named("difference", difference),
                    "switch_share": float("nan") if share is UNDEFINED else self._switched(picked),
                }
            )
        return pd.DataFrame(rows)

    def _switched(self, picked: Sequence[int]) -> float:
        return float(self._switch[picked].sum() / self._best[picked].sum())

    def _difference(self, picked: Sequence[int], others: Sequence[int]) -> Interval:
        pairs = common(self._cells, picked, others)
        if not pairs:
            return UNDEFINED
        return ratio(*self.lead(pairs), *self._alone([mine for mine, _ in pairs]), self.level)

    def _alone(self, picked: Sequence[int]) -> tuple[float, Array]:
        return float(self._best[picked].sum()), self._best_draws[:, picked].sum(axis=1)

    def _ratio(self, picked: Sequence[int]) -> Interval:
        return ratio(*self.gain(picked), *self._alone(picked), self.level)


def by_method(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """Positions of the cells at lambda 1 of every method but the base and single adapters."""
    members: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        if cell.method not in (BASE, ADAPTER) and cell.kl_lambda == 1:
            members.setdefault(cell.method, []).append(index)
    return members


def common(cells: Sequence[Cell], picked: Sequence[int], others: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of a cell of either side that serve the same preference."""
    theirs = {served(cells[index]): index for index in others}
    return [(index, theirs[served(cells[index])]) for index in picked if served(cells[index]) in theirs]


def served(cell: Cell) -> tuple[float, ...]:
    """The weights and the strength that a cell serves, equal where they differ by rounding alone."""
    return tuple(round(value, _DIGITS) for value in (*cell.weights, cell.kl_lambda))
