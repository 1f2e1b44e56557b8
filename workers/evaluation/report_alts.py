"""What each figure shows, in words, for those who do not see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from workers.evaluation.analysis import Analysis
from workers.evaluation.grid import ORACLE
from workers.evaluation.labels import method_label, number, percent, preference_label
from workers.evaluation.plots import mixes, sweeps
from workers.evaluation.plots_cost import costs, measured_kl
from workers.evaluation.plots_drift import lines_of


def alts(analysis: Analysis, names: Iterable[str]) -> dict[str, str]:
    """The texts for the figures of these names."""
    written: dict[str, Callable[[Analysis], str]] = {
        "pareto": _pareto,
        "shares": _shares,
        "dial": _dial,
        "retraining": _retraining,
        "dial_retraining": _dial_retraining,
        "cost": _cost,
        "reward_kl": _reward_kl,
    }
    return {name: written[name](analysis) for name in names if name in written}


def drift_alt(comparison: Mapping[str, Any]) -> str:
    """The text for the figure of then and now."""
    fronts = [
        f"{method_label(line['front'])} {number(line['then']['mean'])} then, {number(line['now']['mean'])} now"
        for line in lines_of(comparison, "fronts")
    ]
    methods = [
        f"{method_label(line['method'])} {percent(line['then']['mean'])} then, {percent(line['now']['mean'])} now"
        for line in lines_of(comparison, "methods")
    ]
    parts = [("Reward space reached", fronts), ("Share of the adapters’ gains kept", methods)]
    return " ".join(f"{name}: {'; '.join(told)}." for name, told in parts if told)


def _methods(analysis: Analysis) -> str:
    return ", ".join(method_label(str(method)) for method in dict.fromkeys(mixes(analysis)["method"]))


def _pareto(analysis: Analysis) -> str:
    even = mixes(analysis).drop_duplicates("method", keep="last").to_dict("records")
    told = [
        f"{method_label(row['method'])} at {preference_label(row, analysis.basis)}: "
        + ", ".join(f"{number(row[f'{name}_gain'], 2)} in {name}" for name in analysis.axes())
        for row in even
    ]
    return (
        "Gain in one reward against gain in another, a panel for each pair of rewards. The base lies at the origin, "
        f"each adapter alone at an end of the curves of {_methods(analysis)}. Gains: {'; '.join(told)}."
    )


def _shares(analysis: Analysis) -> str:
    table = mixes(analysis).dropna(subset=["share"])
    told = [
        f"{method_label(str(method))} {percent(rows['share'].min())} to {percent(rows['share'].max())}"
        for method, rows in table.groupby("method", sort=False)
    ]
    return f"Share of the adapters’ own gains kept at each mix, from the least to the most: {'; '.join(told)}."


def _dial(analysis: Analysis) -> str:
    told = []
    for mix, table in sweeps(analysis).items():
        last = table.iloc[-1]
        gains = (f"{name} {number(last[f'{name}_gain'] / analysis.scales[name].sd, 2)}" for name in analysis.axes())
        told.append(f"{mix} at λ {last['kl_lambda']:g}: {', '.join(gains)}")
    return (
        f"Gain in each reward as λ grows from 0, in base standard deviations, a panel for each mix. {'; '.join(told)}."
    )


def _retraining(analysis: Analysis) -> str:
    table = analysis.rivals[analysis.rivals["method"] != ORACLE].dropna(subset=["share_of_oracle"])
    table = table.sort_values("share_of_oracle", ascending=False)
    told = [f"{method_label(row['method'])} {_interval(row, 'share_of_oracle')}" for row in table.to_dict("records")]
    return f"Share of the retrained models’ gain that each method reaches, over all mixes: {'; '.join(told)}."


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{percent(row[name])} ({percent(row[f'{name}_low'])} to {percent(row[f'{name}_high'])})"


def _dial_retraining(analysis: Analysis) -> str:
    table = analysis.oracles
    table = table[(table["kl_lambda"] != 1) & (table["method"] != ORACLE)]
    told = [
        f"{preference_label(row, analysis.basis)} at λ {row['kl_lambda']:g}: {number(row['weighted_gain'], 2)} by the "
        f"dial, {number(row['oracle_gain'], 2)} retrained"
        for row in table.to_dict("records")
    ]
    return f"Gain against λ in base standard deviations. {'; '.join(told)}."


def _cost(analysis: Analysis) -> str:
    told = [
        f"{method_label(row['method'])} {percent(row['share'])} at {number(row['rows'], 0)} rows"
        for row in costs(analysis).to_dict("records")
    ]
    return f"Share of the gain against UNet rows per image: {'; '.join(told)}."


def _reward_kl(analysis: Analysis) -> str:
    told = [f"{mix}: {_points(table)}" for mix, table in measured_kl(analysis).items()]
    return f"Gain in base standard deviations against path KL from the base, a panel for each mix. {'. '.join(told)}."


def _points(table: pd.DataFrame) -> str:
    return "; ".join(
        f"{method_label(row['method'])} at λ {row['kl_lambda']:g} {number(row['weighted_gain'], 2)} "
        f"at {number(row['path_kl'])}"
        for row in table.to_dict("records")
    )
