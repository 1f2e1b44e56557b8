"""Which UNet rows a sample runs at each step, and how its prediction is put together from them.

A row is (adapter mix, conditional or not). Each method is one planner, a pure function of the sample: it knows neither
the model nor the other samples. A row whose coefficient is 0 is never planned. A prediction is
sum_r c_r pred_r + reuse * kept, where `kept` is a residual sum_r k_r pred_r of an earlier step of the same sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blend.mixing import draw_ls_schedule, guidance_coefficients, sigma_points
from blend.sample import Sample, SampleError

SIGMA_STEPS = 10  # steps at which sigma points are best spread half as wide as one-hot draws; measured on sprites
REUSING_SHARE = 0.65  # of the steps, the last ones: earlier guidance changes too fast and its errors travel further
UNGUIDED, GUIDED, REUSED = "unguided", "guided", "reused"


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one sample at one step, R of them."""

    conditional: tuple[bool, ...]  # [R] whether a row sees the prompt or the negative prompt
    mixes: Tensor  # [R, K] how much of each adapter acts
    coefficients: Tensor  # [R] weight in the sample's prediction
    base_coefficients: Tensor  # [R] weight in the base's prediction; zeros unless it is measured
    keep: Tensor | None  # [R] weights of the residual to keep from here on; None: the old one stays
    reuse: float  # weight, in the sample's prediction, of the residual that an earlier step kept


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of one sample at all its steps."""

    steps: tuple[StepRows, ...]  # steps with the same rows share one object
    measured: bool  # base_coefficients give the base's prediction at every step

    @property
    def peak_rows(self) -> int:
        """The most rows that any step runs."""
        return max(len(step.conditional) for step in self.steps)

    def rows_until(self, step: int) -> int:
        """Return how many rows the first `step` steps run."""
        return sum(len(rows.conditional) for rows in self.steps[:step])


@dataclass(frozen=True, slots=True)
class Source:
    """A mix of adapters that is evaluated at one step, and its share of the prediction."""

    mix: tuple[float, ...]  # [K]; zeros are the base
    share: float


@dataclass(frozen=True, slots=True)
class Step:
    """What a method wants of one step, before it is laid out as rows."""

    sources: tuple[Source, ...]
    guidance: str = GUIDED
    kept: str = ""  # "guidance": keep eps_txt - eps_unc; "residual": keep the blend minus the merged prediction
    reuse_residual: bool = False


def plan_rows(sample: Sample, basis: Sequence[str], steps: int, *, measured: bool) -> Plan:
    """Lay out the rows of a sample at all its steps; with the base's at its reference steps, or at all if measured."""
    coefficients = sample.preference.coefficients(basis)
    if sample.preference.method == "ls" and not isinstance(sample.ls_schedule, str):
        wanted = _plan_named(sample.ls_schedule, basis, coefficients, steps)
    else:
        wanted = _METHODS[sample.preference.method](sample, coefficients, steps)
    merged = Source(tuple(coefficients[1:]), 1.0)
    laid_out: dict[tuple[Step, bool], StepRows] = {}
    planned = []
    for index, step in enumerate(wanted):
        if not _guided_at(sample, index, steps):
            step = Step(step.sources, UNGUIDED)
        key = step, measured or index in sample.reference_steps
        if key not in laid_out:
            laid_out[key] = _lay_out(step, sample, merged, key[1])
        planned.append(laid_out[key])
    return Plan(tuple(planned), measured)


def _guided_at(sample: Sample, index: int, steps: int) -> bool:
    low, high = sample.guidance_interval
    return low <= index / steps < high


def sources_of(coefficients: Sequence[float]) -> tuple[Source, ...]:
    """Return the base and the adapters one by one, those with a coefficient that is not 0."""
    count = len(coefficients) - 1
    return tuple(
        Source(tuple(float(i + 1 == source) for i in range(count)), share)
        for source, share in enumerate(coefficients)
        if share != 0
    )


def _plan_mpa(sample: Sample, coefficients: Sequence[float], steps: int) -> Iterator[Step]:
    """DB-MPA and DB-KLA: every source at every step; exact."""
    for _ in range(steps):
        yield Step(sources_of(coefficients))


def _plan_soup(sample: Sample, coefficients: Sequence[float], steps: int) -> Iterator[Step]:
    """Rewarded Soup: the adapters' weight changes averaged; exact to first order in them."""
    for _ in range(steps):
        yield Step((Source(tuple(coefficients[1:]), 1.0),))


def _plan_ls(sample: Sample, coefficients: Sequence[float], steps: int) -> Iterator[Step]:
    """DB-MPA-LS: one source a step."""
    sources = sources_of(coefficients)
    shares = [source.share for source in sources]
    assert isinstance(sample.ls_schedule, str)
    for index in draw_ls_schedule(shares, steps, sample.seed, sample.ls_schedule):
        yield Step((Source(sources[index].mix, 1.0),))


def _plan_named(
    names: Sequence[str], basis: Sequence[str], coefficients: Sequence[float], steps: int
) -> Iterator[Step]:
    """One adapter a step, as `names` say; weights only tell which may be named."""
    known = [name for name, share in zip(basis, coefficients[1:], strict=True) if share != 0]
    if coefficients[0] != 0:
        raise SampleError("ls_schedule names adapters, which act at full strength: use kl_lambda 1", "ls_schedule")
    if len(names) != steps or not set(names) <= set(known):
        raise SampleError(
            f"ls_schedule names {len(names)} adapters, {', '.join(dict.fromkeys(names))}: use {steps}, one for each"
            f" step, among {', '.join(known)}",
            "ls_schedule",
        )
    for name in names:
        yield Step((Source(tuple(float(name == other) for other in basis), 1.0),))


def _plan_cached(sample: Sample, coefficients: Sequence[float], steps: int) -> Iterator[Step]:
    """The merged prediction plus what it lacked of the blend when that was last evaluated."""
    sources, merged = sources_of(coefficients), (Source(tuple(coefficients[1:]), 1.0),)
    for index in range(steps):
        if len(sources) == 1 or sample.refresh_every == 1:
            yield Step(sources)
        elif index % sample.refresh_every == 0:
            yield Step(sources, kept="residual")
        else:
            yield Step(merged, reuse_residual=True)


def _plan_staged(sample: Sample, coefficients: Sequence[float], steps: int) -> Iterator[Step]:
    """The blend while the noise is strong, merged weights at sigma points after that, within `row_budget`.

    Merging errs to second order in the weight changes, most in the first steps, whose errors also travel furthest.
    Those are paid for by later steps, two of three, reusing eps_txt - eps_unc. Approximate; see blend/README.md.
    """
    sources = sources_of(coefficients)
    exact, reusing = _stages(sample, len(sources), steps)
    # there and back: what one cycle leaves over, the next takes away
    points = _sigma_mixes(coefficients, steps)
    random.Random(f"sigma-points-{sample.seed}").shuffle(points)
    points += reversed(points)
    for index in range(steps):
        if index < exact:
            yield Step(sources, kept="guidance")
        else:
            source = Source(points[(index - exact) % len(points)], 1.0)
            # counted from the end: one step is guided anew, the two before it reuse that of the step before them
            back = steps - 1 - index
            reused = back % 3 != 0 and 2 * (back // 3) + back % 3 <= reusing
            yield Step((source,), REUSED) if reused else Step((source,), kept="guidance")


def _stages(sample: Sample, sources: int, steps: int) -> tuple[int, int]:
    """Return how many steps are exact, and how many of the others reuse their guidance, for a sample's row budget."""
    sides = len(_guided_sides(sample))
    # steps outside the guidance interval have no guidance to reuse
    always = sides == 2 and all(_guided_at(sample, index, steps) for index in range(steps))
    spare = math.floor((sample.row_budget - 1) * sides * steps + 1e-9)
    best = (0, 0)
    for exact in range(steps + 1):
        reusing = max(0, exact * sides * (sources - 1) - spare)
        if reusing > (2 * int(min(steps * REUSING_SHARE, steps - exact) / 3) if always else 0):
            break
        best = (exact, reusing)
    return best


def _sigma_mixes(coefficients: Sequence[float], steps: int) -> list[tuple[float, ...]]:
    """Return the mixes of merged steps, which average to the merged one.

    With many steps their spread tends to that of one-hot draws, so that merging is exact to second order; with few the
    noise it adds weighs more. Past lambda = 1 the base's coefficient is negative and no points can stand for it: only
    the adapters vary.
    """
    with_base = coefficients[0] >= 0
    sources = [i for i, share in enumerate(coefficients) if share > 0 and (i > 0 or with_base)]
    total = math.fsum(coefficients[i] for i in sources)
    amplitude = steps / (steps + SIGMA_STEPS) / (1.0 if with_base else math.sqrt(total))
    mixes = []
    for point in sigma_points([coefficients[i] / total for i in sources], amplitude):
        placed = dict(zip(sources, point, strict=True))
        mixes.append(tuple(total * placed.get(i, 0.0) for i in range(1, len(coefficients))))
    return mixes


_METHODS = {"mpa": _plan_mpa, "ls": _plan_ls, "soup": _plan_soup, "cached": _plan_cached, "staged": _plan_staged}


def _guided_sides(sample: Sample) -> list[tuple[bool, float]]:
    """Return (conditional or not, share of the guided prediction); one side where the other's share is 0."""
    unconditional, conditional = guidance_coefficients(sample.guidance_scale)
    return [side for side in ((False, unconditional), (True, conditional)) if side[1] != 0]


class _Rows:
    """The rows of one step while they are collected; those with equal mix and side become one."""

    def __init__(self) -> None:
        self._rows: dict[tuple[tuple[float, ...], bool], list[float]] = {}

    def add(self, mix: tuple[float, ...], conditional: bool, **shares: float) -> None:
        """Add `shares` (prediction, base, keep) to the row of this mix and side."""
        row = self._rows.setdefault((mix, conditional), [0.0, 0.0, 0.0])
        for place, name in enumerate(("prediction", "base", "keep")):
            row[place] += shares.get(name, 0.0)

    def build(self, keeps: bool, reuse: float) -> StepRows:
        columns = torch.tensor(list(self._rows.values())).T
        return StepRows(
            conditional=tuple(conditional for _, conditional in self._rows),
            mixes=torch.tensor([mix for mix, _ in self._rows]).view(len(self._rows), -1),
            coefficients=columns[0],
            base_coefficients=columns[1],
            keep=columns[2] if keeps else None,
            reuse=reuse,
        )


def _lay_out(step: Step, sample: Sample, merged: Source, measured: bool) -> StepRows:
    rows = _Rows()
    guided = _guided_sides(sample)
    two_sided = len(guided) == 2
    alone = [(True, 1.0)] if two_sided else guided
    sides = guided if step.guidance == GUIDED else alone
    shared = sample.shared_unconditional and len(step.sources) > 1 and two_sided
    for source in step.sources:
        for conditional, share in sides:
            keep = 0.0
            if step.kept == "residual":
                keep = source.share * share
            elif step.kept == "guidance" and two_sided:
                keep = source.share * (1.0 if conditional else -1.0)
            mix = merged.mix if shared and not conditional else source.mix
            rows.add(mix, conditional, prediction=source.share * share, keep=keep)
    if step.kept == "residual":
        for conditional, share in sides:
            rows.add(merged.mix, conditional, keep=-share)
    if measured:
        for conditional, share in alone if step.guidance == UNGUIDED else guided:
            rows.add((0.0,) * len(merged.mix), conditional, base=share)
    reuse = 0.0
    if step.reuse_residual:
        reuse = 1.0
    elif step.guidance == REUSED and two_sided:
        reuse = sample.guidance_scale - 1
    return rows.build(bool(step.kept), reuse)
