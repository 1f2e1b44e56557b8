"""From the modes' samples to what they keep of the exact blend, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from fidelity_parts.runs import BASE, EXACT, INDEPENDENT, MIXES, ModeRun
from numpy.typing import NDArray

from blend.metrics import hypervolume, interval, resample_weights
from blend.mixing import draw_ls_schedule

Array = NDArray[np.float64]
RESAMPLES = 1000
REFERENCE_SDS = 2.0  # as in evaluations: this far below the base's mean
GUIDED_ROWS = 2  # of one model and step


def measure(runs: Mapping[str, ModeRun], steps: int, basis: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return each mode's cost and fidelity; shares are of the exact blend's, distances from its latents.

    Hypervolume is that of the mixes' mean rewards alone, without base and single adapters, which all modes share.
    """
    base = runs[BASE].rewards
    centre, scale = base.mean((0, 1, 2)), base[0].reshape(-1, len(basis)).std(0)
    draws = resample_weights(base.shape[1], RESAMPLES, np.random.default_rng(0))
    everyone = np.full((1, base.shape[1]), 1 / base.shape[1])

    def gains(name: str, weights: Array) -> Array:
        """[B, M, K] mean gains over the base in its standard deviations, under resampled prompts."""
        per_prompt = ((runs[name].rewards - centre) / scale).mean(2)  # [M, P, K]
        return np.einsum("bp,mpk->bmk", weights, per_prompt)

    def squared(name: str, weights: Array) -> Array:
        """[B] mean squared distance of latents from the exact blend's."""
        apart = (runs[name].latents - runs[EXACT].latents).astype(np.float64) ** 2
        return np.asarray(weights @ apart.mean((0, 2, 3, 4, 5)))

    def volumes(name: str, weights: Array) -> Array:
        reference = np.full(len(basis), -REFERENCE_SDS)
        return np.array([hypervolume(front, reference) for front in gains(name, weights)])

    def share(of: Array, whole: Array) -> list[float]:
        return [round(value, 4) for value in interval_of(of, whole)]

    def interval_of(of: Array, whole: Array) -> tuple[float, float, float]:
        found = interval(float(of[0] / whole[0]), of[1:] / whole[1:])
        return found.mean, found.low, found.high

    weights = np.concatenate([everyone, draws])
    exact_gain, exact_volume = gains(EXACT, weights).mean(1), volumes(EXACT, weights)
    base_gain, far = gains(BASE, weights).mean(1), np.sqrt(squared(INDEPENDENT, weights))
    figures = {}
    for name, run in runs.items():
        volume, distance = volumes(name, weights), np.sqrt(squared(name, weights))
        gain = (gains(name, weights).mean(1) - base_gain) / (exact_gain - base_gain)
        shares = {
            reward: [round(float(value), 4) for value in (gain[0, k], *np.quantile(gain[1:, k], [0.025, 0.975]))]
            for k, reward in enumerate(basis)
        }
        three = [index for index, mix in enumerate(MIXES) if all(mix)]
        figures[name] = {
            "rows_ratio": round(float(run.rows[three].mean() / (GUIDED_ROWS * steps)), 4),
            "rows_ratio_pairs": round(float(np.delete(run.rows, three).mean() / (GUIDED_ROWS * steps)), 4),
            "hypervolume_share": round(float(volume[0] / exact_volume[0]), 4),
            "hypervolume_share_interval": share(volume, exact_volume)[1:],
            "latent_rmse": round(float(distance[0]), 4),
            "latent_rmse_interval": [round(float(v), 4) for v in np.quantile(distance[1:], [0.025, 0.975])],
            "latent_rmse_to_independent_ls": share(distance, far),
            "gain_shares": shares,
        }
    return figures


def ls_variance(runs: Mapping[str, ModeRun], steps: int) -> dict[str, float]:
    """Variance that each way to draw LS schedules adds: of an adapter's share of the steps, and of the latents.

    The latents' is their mean squared distance from the exact blend; the share's is over 2,000 schedules at w = 1/3.
    """
    exact = runs[EXACT].latents
    found = {}
    for kind, name in (("iid", INDEPENDENT), ("systematic", "ls, systematic"), ("mirrored", "ls")):
        schedules = np.array([draw_ls_schedule([1 / 3] * 3, steps, seed, kind) for seed in range(2000)])
        found[kind] = float(((runs[name].latents - exact) ** 2).mean())
        found[f"{kind}_share"] = float((schedules == 0).mean(1).var())
    return found
