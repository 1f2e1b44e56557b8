"""From scored samples to means, differences, shares, hypervolumes and what oracles reach, with bootstrap intervals.

The unit of resampling is the prompt (its seeds are averaged first), and all statistics share the same draws,
so that every difference is paired. Rewards are compared in standard deviations of the base model's samples, as the
adapters' training measured them (few seeds, which all prompts share, would say too little) or else as they are here;
this scale and the reference point are fixed once and not resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blend.metrics import Interval, hypervolume, igd_plus, interval, normalise, pareto_mask, resample_weights
from infra.comparing import ADAPTERS_ALONE
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.grid import ADAPTER, BASE, ORACLE, Cell
from workers.evaluation.oracle_shares import oracle_table, rival_table
from workers.evaluation.shares import UNDEFINED, Shares, named

Array = NDArray[np.float64]
# What a judge of images against prompts says: 1 or 0 for a sample, NaN for a prompt that it cannot read.
VERDICTS = ("colour_right", "object_right", "binding_right")


@dataclass(frozen=True, slots=True)
class Scale:
    """What one unit of each objective is: base mean and standard deviation over the base's samples."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything the figures and the report are made of.

    `summary` has one row per cell, `overall` one per method, `fronts` one per hypervolume, `oracles` one per cell at
    whose preference there is an oracle, `rivals` one per method at these preferences; `objectives[i]` is the reward
    of adapter i.
    """

    basis: tuple[str, ...]
    objectives: tuple[str, ...]
    rewards: tuple[str, ...]
    scales: dict[str, Scale]
    reference_sds: float
    summary: pd.DataFrame
    overall: pd.DataFrame
    fronts: pd.DataFrame
    oracles: pd.DataFrame
    rivals: pd.DataFrame

    def axes(self) -> tuple[str, ...]:
        """The distinct objectives, in basis order."""
        return tuple(dict.fromkeys(self.objectives))

    @property
    def timed(self) -> bool:
        """Whether seconds are what an image takes: where the path KL was measured, they hold that as well."""
        return bool(self.summary["path_kl"].isna().all())


class _Draws:
    """Values [cells, prompts, columns] and their bootstrap means [resamples, cells, columns]."""

    def __init__(self, values: Array, weights: Array) -> None:
        self.mean = values.mean(axis=1)
        self.draws = np.einsum("bp,cpk->bck", weights, values)


def analyse(
    frame: pd.DataFrame,
    cells: Sequence[Cell],
    basis: Sequence[str],
    objectives: Sequence[str],
    rewards: Sequence[str],
    config: EvaluateConfig,
    known_sds: Mapping[str, float] | None = None,
) -> Analysis:
    """Summarise samples (columns cell, prompt_index, seed, rewards, rows, seconds, ...) cell by cell.

    decodes, gradients and memory_mb may be missing, then they are NaN; so may a judge's columns, then so are its means;
    and so may failed, then nothing did.
    """
    scales = {name: _scale(frame.loc[frame["cell"] == 0, name], (known_sds or {}).get(name)) for name in rewards}
    weights = resample_weights(
        frame["prompt_index"].nunique(), config.resamples, np.random.default_rng(config.bootstrap_seed)
    )
    raw = _Draws(_per_prompt(frame, rewards), weights)
    rows = [
        {
            **_identity(index, cell, basis),
            **_costs(frame.loc[frame["cell"] == index]),
            **_rewards(raw, index, rewards, config.confidence),
        }
        for index, cell in enumerate(cells)
    ]
    axes = list(dict.fromkeys(objectives))
    columns = [list(rewards).index(name) for name in axes]
    mean, draws = (_in_sds(values[..., columns], [scales[name] for name in axes]) for values in (raw.mean, raw.draws))
    shares = Shares(mean, draws, cells, [axes.index(name) for name in objectives], config.confidence)
    for index, row in enumerate(rows):
        row.update(shares.of_cell(index))
    summary = pd.DataFrame(rows)
    summary["pareto"] = pareto_mask(mean)
    return Analysis(
        basis=tuple(basis),
        objectives=tuple(objectives),
        rewards=tuple(rewards),
        scales=scales,
        reference_sds=config.reference_sds,
        summary=summary,
        overall=shares.overall(),
        fronts=_fronts(mean, draws, cells, config),
        oracles=oracle_table(cells, basis, shares, summary),
        rivals=rival_table(cells, shares, summary),
    )


def _scale(values: pd.Series, known_sd: float | None) -> Scale:
    """Falls back to the reward's own unit where the base's samples all score the same."""
    if known_sd is not None:
        return Scale(float(values.mean()), known_sd)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Scale(float(values.mean()), spread if spread > 0 else 1.0)


def _in_sds(values: Array, scales: Sequence[Scale]) -> Array:
    return normalise(values, [scale.mean for scale in scales], [scale.sd for scale in scales])


def _per_prompt(frame: pd.DataFrame, columns: Sequence[str]) -> Array:
    """Means over seeds as [cells, prompts, columns]."""
    grouped = frame.groupby(["cell", "prompt_index"])[list(columns)].mean().sort_index()
    cells, prompts = (frame[key].nunique() for key in ("cell", "prompt_index"))
    return grouped.to_numpy(dtype=np.float64).reshape(cells, prompts, len(columns))


def _identity(index: int, cell: Cell, basis: Sequence[str]) -> dict[str, object]:
    weights = {f"w_{name}": weight for name, weight in zip(basis, cell.weights, strict=True)}
    return {"cell": index, "method": cell.method, **weights, "kl_lambda": cell.kl_lambda}


def _costs(samples: pd.DataFrame) -> dict[str, object]:
    return {
        "prompts": samples["prompt_index"].nunique(),
        "samples": len(samples),
        "failed": int(samples["failed"].sum()) if "failed" in samples else 0,
        "rows": samples["rows"].mean(),
        "seconds": samples["seconds"].mean(),
        "diversity": samples["diversity"].mean(),
        "path_kl": samples["path_kl"].mean(),
        "decodes": _column(samples, "decodes").mean(),
        "gradients": _column(samples, "gradients").mean(),
        "memory_mb": _column(samples, "memory_mb").max(),
        **{name: samples[name].mean() for name in VERDICTS if name in samples},
    }


def _column(samples: pd.DataFrame, name: str) -> pd.Series:
    return samples[name] if name in samples else pd.Series([np.nan])


def _rewards(raw: _Draws, index: int, rewards: Sequence[str], level: float) -> dict[str, float]:
    """Each reward's mean and its paired difference from the base (cell 0), in the reward's own unit."""
    row: dict[str, float] = {}
    for column, name in enumerate(rewards):
        draws, base = raw.draws[:, index, column], raw.draws[:, 0, column]
        gain = raw.mean[index, column] - raw.mean[0, column]
        row |= named(name, interval(raw.mean[index, column], draws, level))
        row |= named(f"{name}_gain", interval(gain, draws - base, level))
    return row


def _fronts(mean: Array, draws: Array, cells: Sequence[Cell], config: EvaluateConfig) -> pd.DataFrame:
    """Hypervolume of what each method can reach, its paired ratio to the adapters alone, its distance to oracles.

    Every front may use the base and the single adapters, so methods differ by their blends only.
    """
    reference = np.full(mean.shape[1], -config.reference_sds)
    members = front_members(cells)
    values = {
        name: (
            hypervolume(mean[list(picked)], reference),
            np.array([hypervolume(draw[list(picked)], reference) for draw in draws]),
        )
        for name, picked in members.items()
    }
    distances = _distances(mean, draws, members, config.confidence)
    alone, alone_draws = values[ADAPTERS_ALONE]
    rows = []
    for name, (value, spread) in values.items():
        ratio = interval(value / alone, spread / alone_draws, config.confidence) if alone > 0 else UNDEFINED
        rows.append(
            {
                "front": name,
                "cells": len(members[name]),
                **named("hypervolume", interval(value, spread, config.confidence)),
                **named("ratio", ratio),
                **named("igd", distances[name]),
            }
        )
    return pd.DataFrame(rows)


def _distances(mean: Array, draws: Array, members: dict[str, tuple[int, ...]], level: float) -> dict[str, Interval]:
    """IGD+ of every front from the points that no other one of base, adapters and oracles dominates.

    Each resample has oracle points of its own. Noise alone makes the figure positive, and more so in the resamples.
    """
    if ORACLE not in members:
        return dict.fromkeys(members, UNDEFINED)
    worlds = [mean, *draws]
    reach = [world[list(members[ORACLE])] for world in worlds]
    goals = [points[pareto_mask(points)] for points in reach]
    found = {}
    for name, picked in members.items():
        value, *spread = (igd_plus(world[list(picked)], goal) for world, goal in zip(worlds, goals, strict=True))
        found[name] = interval(value, spread, level)
    return found


def front_members(cells: Sequence[Cell]) -> dict[str, tuple[int, ...]]:
    """Positions of the cells of each front: base, adapters alone, each method at lambda 1 and at any.

    Oracles have lambda 1 alone: one for another strength is another training, no turn of a dial.
    """
    shared = tuple(index for index, cell in enumerate(cells) if cell.method in (BASE, ADAPTER))
    members = {BASE: (0,), ADAPTERS_ALONE: shared}
    methods = dict.fromkeys(cell.method for cell in cells if cell.method not in (BASE, ADAPTER))
    for method in methods:
        mine = [index for index, cell in enumerate(cells) if cell.method == method]
        plain = tuple(index for index in mine if cells[index].kl_lambda == 1)
        if plain:
            members[method] = shared + plain
        if len(mine) > len(plain) and method != ORACLE:
            members[f"{method}, any lambda"] = shared + tuple(mine)
    return members
