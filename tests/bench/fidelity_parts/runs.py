"""What the fidelity benchmark runs: the modes, the mixes, and one mode's samples over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blend.engine import BlendEngine, Sample
from blend.preference import Preference
from blend.rewards import load_reward
from blend.sprites.captions import held_out_prompts
from infra.settings import read_settings
from workers.bundles import load_engine, open_bundle

GUIDANCE = 3.0
# mixes of all three adapters first, then the pairs: in units of the least share
MIXES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 0), (1, 0, 1), (0, 1, 1))
BASE, EXACT, INDEPENDENT = "base", "mpa", "ls, independent"


@dataclass(frozen=True, slots=True)
class Mode:
    """A method with its options, under the name it has in the figures."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    kl_lambda: float = 1.0


MODES = (
    Mode(BASE, "mpa", kl_lambda=0.0),
    Mode(EXACT, "mpa"),
    Mode(INDEPENDENT, "ls", {"ls_schedule": "iid"}),
    Mode("ls, systematic", "ls", {"ls_schedule": "systematic"}),
    Mode("ls", "ls"),
    Mode("soup", "soup"),
    Mode("staged 1.0", "staged"),
    Mode("staged 1.25", "staged", {"row_budget": 1.25}),
    Mode("staged 1.5", "staged", {"row_budget": 1.5}),
    Mode("cached 5", "cached", {"refresh_every": 5}),
    Mode("cached 10", "cached", {"refresh_every": 10}),
    Mode("shared unconditional", "mpa", {"shared_unconditional": True}),
    Mode("guidance to 0.8", "mpa", {"guidance_interval": (0.0, 0.8)}),
)


@dataclass(frozen=True, slots=True)
class ModeRun:
    """One mode's samples at one number of steps: M mixes, P prompts, S seeds, K rewards."""

    rows: NDArray[np.float64]  # [M] UNet rows per image
    latents: NDArray[np.float32]  # [M, P, S, C, h, w]
    rewards: NDArray[np.float64]  # [M, P, S, K]


@cache
def engine() -> BlendEngine:
    """The shipped bundle, once per process, on one thread."""
    torch.set_num_threads(1)
    return load_engine(open_bundle(settings=read_settings()))


def run_mode(mode: Mode, steps: int, prompts: int, seeds: int) -> ModeRun:
    """Denoise, decode and score every mix of one mode: the same prompts and noise whatever the mode."""
    texts = held_out_prompts(prompts)
    basis = engine().bank.names
    rewards = [load_reward(name) for name in basis]
    rows, latents, scores = [], [], []
    for mix in MIXES:
        weights = {name: share / sum(mix) for name, share in zip(basis, mix, strict=True)}
        preference = Preference(weights=weights, kl_lambda=mode.kl_lambda, method=mode.method)
        samples = [
            Sample(
                prompt=text,
                preference=preference,
                seed=1000 * index + seed,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                **mode.options,
            )
            for index, text in enumerate(texts)
            for seed in range(seeds)
        ]
        outputs = engine().run(samples)
        images = engine().decode([output.latents for output in outputs])
        captions = [sample.prompt for sample in samples]
        rows.append(float(np.mean([output.rows for output in outputs])))
        latents.append(torch.stack([output.latents for output in outputs]).numpy())
        scores.append(torch.stack([reward(images, captions) for reward in rewards], dim=1).double().numpy())
    shape = (len(MIXES), prompts, seeds)
    return ModeRun(
        rows=np.array(rows),
        latents=np.stack(latents).reshape(*shape, *latents[0].shape[1:]),
        rewards=np.stack(scores).reshape(*shape, len(basis)),
    )
