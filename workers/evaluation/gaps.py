"""The Jensen gap as a table, a figure and a predictor: how far blends lie from models retrained for their preference.

blend.gap measures it; here it is averaged over prompts, drawn by step and compared with the reward that blends lose.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from re import sub
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from blend.engine import BlendEngine, Sample
from blend.gap import Gap, Side, measure_gap
from blend.metrics import Interval, MetricError, interval, resample_weights
from blend.preference import Preference
from workers.evaluation.labels import dial_label, method_label, preference_label
from workers.evaluation.shares import UNDEFINED, named
from workers.evaluation.style import LIGHT, Theme, new_figure, png, quiet

Array = NDArray[np.float64]
FEWEST = 3  # pairs, of which a correlation is not 1 or -1 whatever they are
EXACT = 8  # pairs up to which all orders are tried
LABEL_WIDTH = 28  # characters of a line of a label
LINE_INCHES = 0.15  # height of such a line


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals over prompts are drawn."""

    resamples: int = 2000
    seed: int = 0
    confidence: float = 0.95


def gap_table(
    engine: BlendEngine,
    prompts: Sequence[str],
    seeds: Sequence[int],
    pairs: Sequence[tuple[Preference, Preference]],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    eta: float = 1.0,
    along: Side = "blend",
    bootstrap: Bootstrap | None = None,
    on_pair: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row per pair (blend, oracle) and step; blend/README.md says what its columns are.

    The engine's bank holds the oracles' adapters. Means are over prompts, whose seeds are averaged first; on_pair
    receives (pairs done, in all).
    """
    bootstrap = bootstrap or Bootstrap()
    weights = resample_weights(len(prompts), bootstrap.resamples, np.random.default_rng(bootstrap.seed))
    basis = list(dict.fromkeys(name for blend, _ in pairs for name in blend.weights))
    tables = []
    for index, (blend, oracle) in enumerate(pairs):
        samples = [
            Sample(
                prompt,
                blend,
                seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
            )
            for prompt in prompts
            for seed in seeds
        ]
        gap = measure_gap(engine, samples, oracle, along=along)
        rows = _steps(gap, weights, len(prompts), bootstrap.confidence)
        identity = {
            "pair": index,
            "method": blend.method,
            **{f"w_{name}": blend.weights.get(name, 0.0) for name in basis},
            "kl_lambda": blend.kl_lambda,
            "oracle": _oracle_name(oracle),
            "along": along,
        }
        tables.append(pd.DataFrame([{**identity, **row} for row in rows]))
        if on_pair is not None:
            on_pair(index + 1, len(pairs))
    return pd.concat(tables, ignore_index=True)


def _steps(gap: Gap, weights: Array, prompts: int, level: float) -> list[dict[str, object]]:
    total = len(gap.timesteps)

    def mean(name: str, values: Tensor) -> list[dict[str, float]]:
        """Means with intervals, one for each column of values [S, N]."""
        each = values.numpy().reshape(prompts, -1, values.shape[1]).mean(axis=1)
        return [named(name, _interval(column, weights, level)) for column in each.T]

    columns = [
        mean("relative_gap", gap.relative),
        mean("cosine", gap.cosine),
        mean("distance", gap.distance),
        mean("oracle_shift", gap.oracle_shift),
        mean("blend_shift", gap.blend_shift),
        mean("kl", gap.kl),
        mean("base_kl", gap.base_kl),
        # of the whole path, the same at every step
        mean("path_kl", gap.path_kl[:, None]) * total,
        mean("base_path_kl", gap.base_path_kl[:, None]) * total,
    ]
    return [
        {
            "step": step + 1,
            "timestep": int(gap.timesteps[step]),
            "alpha_bar": float(gap.alphas_cumprod[step]),
            "way": step / total,
            **{name: value for column in columns for name, value in column[step].items()},
        }
        for step in range(total)
    ]


def _interval(values: Array, weights: Array, level: float) -> Interval:
    if not np.isfinite(values).all():
        return UNDEFINED
    return interval(float(values.mean()), weights @ values, level)


def _oracle_name(oracle: Preference) -> str:
    """The adapter's name where it is one alone."""
    used = {name: weight for name, weight in oracle.weights.items() if weight > 0}
    if oracle.kl_lambda == 1 and len(used) == 1:
        return next(iter(used))
    parts = (f"{name} {weight:g}" for name, weight in used.items())
    return f"{oracle.method}, λ {oracle.kl_lambda:g}: {' + '.join(parts)}" if oracle.kl_lambda else "base"


@dataclass(frozen=True, slots=True)
class Association:
    """How two series go together over n preferences; look at n and the interval before the coefficient."""

    n: int
    spearman: float
    spearman_p: float  # two-sided: the share of orders that go together as well; exact for few preferences
    pearson: float
    pearson_low: float  # 95 % interval by Fisher's transformation, as if points were normal; -1 to 1 for three
    pearson_high: float

    def __str__(self) -> str:
        return (
            f"n = {self.n}: Spearman {self.spearman:.2f} (p = {self.spearman_p:.2g}),"
            f" Pearson {self.pearson:.2f} ({self.pearson_low:.2f} to {self.pearson_high:.2f})"
        )


def gap_against_loss(
    gaps: Mapping[Hashable, float] | Sequence[float] | pd.Series,
    losses: Mapping[Hashable, float] | Sequence[float] | pd.Series,
) -> Association:
    """Correlate a gap per preference (path KL, or mean relative gap) with the reward that the blend loses there.

    A loss is the oracle's weighted gain less the blend's. Both go by the same keys, in any order; sequences by place.
    Raises MetricError for other keys, fewer than three, values that are not finite, or a series that never varies.
    """
    ours, theirs = pd.Series(gaps, dtype=float), pd.Series(losses, dtype=float)
    strangers = ours.index.symmetric_difference(theirs.index)
    if len(strangers) or not ours.index.is_unique or not theirs.index.is_unique:
        raise MetricError(f"gaps and losses go by different keys, or by one twice: {[*strangers] or [*ours.index]}")
    theirs = theirs.reindex(ours.index)
    if len(ours) < FEWEST:
        raise MetricError(f"{len(ours)} preferences say nothing about a correlation: measure at least {FEWEST}")
    for name, values in (("gaps", ours), ("losses", theirs)):
        if not np.isfinite(values).all() or values.nunique() == 1:
            raise MetricError(f"{name} {values.tolist()} must be finite and not all the same")
    pearson = stats.pearsonr(ours, theirs)
    bounds = pearson.confidence_interval(0.95) if len(ours) > FEWEST else (-1.0, 1.0)
    ranks = stats.rankdata(ours), stats.rankdata(theirs)
    spearman = float(np.corrcoef(*ranks)[0, 1])
    return Association(
        len(ours), spearman, _permutation_p(*ranks), float(pearson.statistic), float(bounds[0]), float(bounds[1])
    )


def _permutation_p(ours: Array, theirs: Array) -> float:
    found = stats.permutation_test(
        (ours,),
        lambda order: np.corrcoef(order, theirs)[0, 1],
        permutation_type="pairings",
        n_resamples=np.inf if len(ours) <= EXACT else 9999,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def gap_png(table: pd.DataFrame, theme: Theme = LIGHT) -> bytes:
    """The relative gap by step with its interval over prompts, one line per pair of a `gap_table`."""
    labels = _labels(table)
    figure = new_figure(theme, 7.6, max(3.8, 1.3 + sum(_height(label) for label in labels.values())))
    axes = figure.subplots()
    ends = []
    for place, (pair, label) in enumerate(labels.items()):
        rows = table[table["pair"] == pair].sort_values("step").dropna(subset=["relative_gap"])
        if rows.empty:
            continue
        colour = theme.series[place % len(theme.series)]
        style = ("-", (0, (5, 2)), (0, (1, 1.2)))[place // len(theme.series) % 3]
        axes.fill_between(
            rows["step"], rows["relative_gap_low"], rows["relative_gap_high"], color=colour, alpha=0.13, linewidth=0
        )
        axes.plot(rows["step"], rows["relative_gap"], color=colour, linewidth=1.8, linestyle=style)
        ends.append((float(rows["relative_gap"].iloc[-1]), label, colour))
    last = int(table["step"].max())
    axes.axhline(1, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        "as far as the base",
        (1, 1),
        xytext=(4, 3),
        textcoords="offset points",
        color=theme.muted,
        fontsize=8.5,
    )
    axes.set_xlim(1, last)
    axes.set_ylim(0, max(1.12, float(table["relative_gap_high"].max()) * 1.04))
    axes.set_xticks(sorted({1, *range(5, last - 1, 5), last}))
    axes.set_xlabel("step, from noise to image")
    axes.set_ylabel("distance of blend and oracle over\ndistance of oracle and base")
    quiet(axes, theme, grid="y")
    _name_ends(axes, ends, last, figure.get_figheight())
    return png(figure)


def _labels(table: pd.DataFrame) -> dict[int, str]:
    """What tells the pairs of a table apart: mix and strength, and method or oracle where those do not."""
    basis = [name.removeprefix("w_") for name in table.columns if name.startswith("w_")]
    several = table["method"].nunique() > 1
    labels = {}
    for row in table.drop_duplicates("pair").to_dict("records"):
        other = method_label(row["method"]) if several and row["method"] != "mpa" else ""
        parts = [preference_label(row, basis), dial_label(row), other]
        labels[row["pair"]] = " · ".join(part for part in parts if part)
    oracles = dict(zip(table["pair"], table["oracle"], strict=True))
    names = list(labels.values())
    found = {pair: f"{name} · {oracles[pair]}" if names.count(name) > 1 else name for pair, name in labels.items()}
    # no line ends within "λ 0.5" or "50 %", and none begins with a dot
    kept = {pair: sub(r"(?<=λ) | (?=[%·+])", "\N{NO-BREAK SPACE}", name) for pair, name in found.items()}
    return {pair: fill(name, LABEL_WIDTH, break_on_hyphens=False) for pair, name in kept.items()}


def _height(label: str) -> float:
    """Inches that a label takes, with some room to the next."""
    return LINE_INCHES * (label.count("\n") + 1) + 0.07


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], last: int, inches: float) -> None:
    """Write each label beside the end of its line, in their order and never over one another."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, reverse=True)
    half = [(high - low) * _height(label) / 2 / (inches - 0.8) for _, label, _ in ordered]
    at, ceiling = [], high
    for (value, _, _), room in zip(ordered, half, strict=True):
        at.append(min(value, ceiling - room))
        ceiling = at[-1] - room
    # what was pushed below the floor pushes the others up again
    floor = low
    for place in reversed(range(len(at))):
        at[place] = max(at[place], floor + half[place])
        floor = at[place] + half[place]
    for (value, label, colour), height in zip(ordered, at, strict=True):
        axes.annotate(
            label,
            (last, value),
            xytext=(last + 0.045 * last, height),
            textcoords="data",
            color=colour,
            fontsize=8.5,
            va="center",
            linespacing=1.05,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "patchA": None,
                "shrinkA": 3,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )
