"""The held-out evaluation: what it measures, and what it says about going on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blend.finetune.config import Guard
from blend.finetune.rollout import Request, Scored
from blend.finetune.workgroup import Workgroup
from blend.metrics import diversity

Metrics = dict[str, Any]
SHEET_IMAGES, SHEET_PIXELS = 8, 256
FORGIVEN = 1.1  # path KL of an adapter that counts as within its budget, over that budget


def owned_requests(requests: Sequence[Request], workgroup: Workgroup) -> list[Request]:
    """The held-out requests of this worker: whole groups, since diversity is measured within each."""
    groups = workgroup.slice(requests[-1].group + 1)
    return [request for request in requests if request.group in groups]


def summarise(
    rewards: Tensor,
    watched: Mapping[str, Tensor],
    path_kl: Tensor,
    scored: Scored,
    requests: Sequence[Request],
    workgroup: Workgroup,
) -> Metrics:
    """The held-out metrics of one policy.

    rewards, watched and path_kl (nats) are over all requests, [N]; scored holds this worker's share of them.
    """
    metrics: Metrics = {
        **{f"held_out_{name}": value for name, value in _moments(rewards).items()},
        "held_out_path_kl": path_kl.mean().item(),
        "held_out_diversity": _diversity(scored, requests, workgroup),
    }
    if watched:
        metrics["watched"] = {name: _moments(values) for name, values in watched.items()}
    return metrics


def broken_rule(guard: Guard, history: Sequence[Metrics]) -> str | None:
    """What the latest evaluation of `history` broke, in words; None while the run may go on.

    history: at least the base's line; lines without an evaluation are passed over.
    """
    evaluations = [line for line in history if "held_out_mean" in line]
    base, latest = evaluations[0], evaluations[-1]
    path_kl = latest["held_out_path_kl"]
    if guard.kl is not None and path_kl > guard.kl:
        return f"path KL {path_kl:.1f} nats, above guard.kl {guard.kl:g}"
    best = max(line["held_out_mean"] for line in evaluations)
    fall = (best - latest["held_out_mean"]) / max(base["held_out_std"], 1e-9)
    if guard.drop is not None and fall > guard.drop:
        return f"held-out reward {fall:.2f} base deviations below its best, above guard.drop {guard.drop:g}"
    for name, most in guard.watch.items():
        before, now = base["watched"][name], latest["watched"][name]
        fall = (before["mean"] - now["mean"]) / max(before["std"], 1e-9)
        if fall > most:
            return f"{name} {fall:.2f} of its deviations below the base, above guard.watch.{name} {most:g}"
    return None


def best_within(history: Sequence[Metrics], kl_target: float | None) -> int | None:
    """The iteration whose held-out reward is highest of those that keep the budget (nats); None when none does."""
    most = math.inf if kl_target is None else FORGIVEN * kl_target
    tuned = [line for line in history if "held_out_mean" in line and line["iteration"]]
    within = [line for line in tuned if line["held_out_path_kl"] <= most]
    return max(within, key=lambda line: line["held_out_mean"])["iteration"] if within else None


def published(history: Sequence[Metrics]) -> Metrics:
    """The evaluation of the adapter that is published: the last, or the one that the run went back to at its end."""
    evaluations = [line for line in history if "held_out_mean" in line]
    kept = history[-1].get("kept_iteration")
    return evaluations[-1] if kept is None else next(line for line in evaluations if line["iteration"] == kept)


def sheet_row(scored: Scored) -> Tensor:
    """The first image of each of the first prompts, for people to look at: uint8 [n, 3, h, w], sides of at most 256."""
    groups = [request.group for request in scored.requests]
    first = [place for place, group in enumerate(groups) if place == 0 or groups[place - 1] != group]
    images = scored.images[first[:SHEET_IMAGES]]
    # every checkpoint holds all rows so far
    scale = min(1.0, SHEET_PIXELS / max(images.shape[2:]))
    if scale < 1:
        images = functional.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _moments(values: Tensor) -> Metrics:
    std = values.std().item()
    return {"mean": values.mean().item(), "std": std, "ci": 1.96 * std / math.sqrt(len(values))}


def _diversity(scored: Scored, requests: Sequence[Request], workgroup: Workgroup) -> float | None:
    """Mean RMS distance between two images of one prompt, over all workers' prompts; None when none has two."""
    sums = torch.zeros(2, dtype=torch.float64)
    groups = torch.tensor([request.group for request in scored.requests])
    for group in groups.unique().tolist():
        members = scored.images[groups == group]
        if len(members) > 1:
            sums += torch.tensor([diversity(members.numpy()).mean(), 1.0], dtype=torch.float64)
    total, count = workgroup.sum_(sums).tolist()
    return total / count if count else None
