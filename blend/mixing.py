"""Pure functions of the blend: sum predictions, apply guidance, draw which adapter acts at which step.

Equations: arXiv 2505.18547 (DB-MPA, DB-KLA, DB-MPA-LS). Nothing here knows a UNet or an adapter.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

LS_KINDS = ("mirrored", "systematic", "iid")
_LONGEST_PERIOD = 8


def blend_predictions(preds: Tensor, coefficients: Tensor, owner: Tensor, n: int) -> Tensor:
    """Return [n, ...]: for each sample the sum of its rows' predictions, weighted: eps = sum_i c_i eps_i.

    preds: [R, ...]; coefficients: [R]; owner: [R] long, the sample of each row. Summed in float32 and, per sample,
    in row order whatever the other rows are: a sample's bits do not depend on its neighbours.
    """
    weighted = preds.float() * coefficients.to(preds.device, torch.float32).view(-1, *[1] * (preds.dim() - 1))
    total = torch.zeros((n, *preds.shape[1:]), dtype=torch.float32, device=preds.device)
    owners = owner.tolist()
    # the j-th pass adds the j-th row of every sample: indices within a pass are distinct, so CUDA is exact too
    for pass_rows in _passes(owners):
        index = torch.tensor(pass_rows, device=preds.device)
        target = torch.tensor([owners[row] for row in pass_rows], device=preds.device)
        total = total.index_add(0, target, weighted[index])
    return total


def _passes(owners: Sequence[int]) -> list[list[int]]:
    seen: dict[int, int] = {}
    passes: list[list[int]] = []
    for row, sample in enumerate(owners):
        turn = seen.get(sample, 0)
        seen[sample] = turn + 1
        if turn == len(passes):
            passes.append([])
        passes[turn].append(row)
    return passes


def guide(noise_pred_uncond: Tensor, noise_pred_text: Tensor, guidance_scale: Tensor | float) -> Tensor:
    """Return eps_unc + g (eps_txt - eps_unc), classifier-free guidance (arXiv 2207.12598); g: a number or [R]."""
    scale = torch.as_tensor(guidance_scale, dtype=noise_pred_text.dtype, device=noise_pred_text.device)
    if scale.dim():
        scale = scale.view(-1, *[1] * (noise_pred_text.dim() - 1))
    return noise_pred_uncond + scale * (noise_pred_text - noise_pred_uncond)


def guidance_coefficients(guidance_scale: float) -> tuple[float, float]:
    """Return (c_unc, c_txt) = (1 - g, g): guidance as a blend; one of them is 0 at g = 1 and at g = 0."""
    return 1.0 - guidance_scale, guidance_scale


def draw_ls_schedule(weights: Sequence[float], steps: int, seed: int, kind: str = "mirrored") -> list[int]:
    """Return, for each step, the index of the one source that acts there (DB-MPA-LS); P(source i) = weights[i].

    weights: non-negative, summing to 1, over any sources (the engine passes base and adapters).
    kind "iid" draws each step anew, as the paper does. "systematic" is our departure: the same marginals with far
    less variance. For two sources source i acts where floor(u + w(j+1)) - floor(u + w j) = 1 with one u ~ U(0, 1), so
    its count never strays by 1 or more from j w. More sources are split in two again and again, each split counting
    only the steps handed to it and with a phase of its own, which keeps every step's marginal exactly w. "mirrored"
    walks every second period of that backwards (A B C C B A ..): what one period leaves over, the next takes away.
    Raises ValueError for an unknown kind or weights that are no distribution.
    """
    if kind not in LS_KINDS:
        raise ValueError(f"kind is {kind!r}: use one of {', '.join(LS_KINDS)}")
    if any(not weight >= 0 for weight in weights) or abs(math.fsum(weights) - 1) > 1e-5:
        raise ValueError(f"weights {list(weights)} are no distribution: use values >= 0 that sum to 1")
    # a stream of its own: the sample's noise is drawn from torch's generator under the same seed
    rng = random.Random(f"ls-schedule-{seed}")
    if kind == "iid":
        return rng.choices(range(len(weights)), weights=weights, k=steps)
    sources = [index for index, weight in enumerate(weights) if weight > 0]
    phases = [rng.random() for _ in sources]
    schedule = [sources[0]] * steps
    _split(_huffman({index: weights[index] for index in sources}), list(range(steps)), phases, schedule)
    return _mirror(schedule, _period(weights)) if kind == "mirrored" else schedule


def _period(weights: Sequence[float]) -> int:
    """Return the number of steps, 2 to 8, after which counts come nearest to whole numbers."""

    def off(steps: int) -> float:
        return max(abs(steps * weight - round(steps * weight)) for weight in weights)

    return min(range(2, _LONGEST_PERIOD + 1), key=lambda steps: (round(off(steps), 6), steps))


def _mirror(schedule: list[int], period: int) -> list[int]:
    # the same places for every phase: each step's marginal stays what it is
    blocks = [schedule[start : start + period] for start in range(0, len(schedule), period)]
    return [index for place, block in enumerate(blocks) for index in (block[::-1] if place % 2 else block)]


class _Split:
    """An inner node: two groups of sources and their weights."""

    __slots__ = ("left", "left_weight", "right", "right_weight")

    def __init__(self, left: _Split | int, left_weight: float, right: _Split | int, right_weight: float) -> None:
        self.left, self.left_weight = left, left_weight
        self.right, self.right_weight = right, right_weight


def _huffman(weights: dict[int, float]) -> _Split | int:
    # joining the two lightest groups keeps heavy sources near the root, where a count strays least
    order = itertools.count()
    heap: list[tuple[float, int, _Split | int]] = [(weight, next(order), index) for index, weight in weights.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        light, heavy = heapq.heappop(heap), heapq.heappop(heap)
        node = _Split(heavy[2], heavy[0], light[2], light[0])
        heapq.heappush(heap, (light[0] + heavy[0], next(order), node))
    return heap[0][2]


def _split(node: _Split | int, steps: list[int], phases: list[float], schedule: list[int]) -> None:
    if isinstance(node, int):
        for step in steps:
            schedule[step] = node
        return
    phase, share = phases.pop(), node.left_weight / (node.left_weight + node.right_weight)
    left = [math.floor(phase + share * (j + 1)) - math.floor(phase + share * j) == 1 for j in range(len(steps))]
    _split(node.left, [step for step, taken in zip(steps, left, strict=True) if taken], phases, schedule)
    _split(node.right, [step for step, taken in zip(steps, left, strict=True) if not taken], phases, schedule)


def sigma_points(weights: Sequence[float], amplitude: float) -> list[list[float]]:
    """Return n points in R^n whose mean is `weights` and whose covariance is amplitude^2 (diag(w) - w w^T).

    weights: positive, summing to 1. The one-hot draws of DB-MPA-LS have the same mean and, at amplitude 1, the same
    covariance, but these are n points of equal share: a cycle of n steps that takes each once misses neither moment.
    At amplitude 0 all are w. The simplex of the unscented transform (Julier and Uhlmann, 1997), our use of it.
    """
    n = len(weights)
    root = [math.sqrt(weight) for weight in weights]
    # the reflection that takes (1, .., 1) / sqrt(n) to sqrt(w) turns the axes into the simplex, scaled by sqrt(w)
    normal = [1 / math.sqrt(n) - value for value in root]
    squared = math.fsum(value * value for value in normal)
    points = []
    for q in range(n):
        pull = 2 * normal[q] / squared if squared > 1e-24 else 0.0
        reflected = [float(i == q) - pull * normal[i] for i in range(n)]
        point = [math.sqrt(n) * root[i] * reflected[i] for i in range(n)]
        points.append([w + amplitude * (value - w) for w, value in zip(weights, point, strict=True)])
    return points
