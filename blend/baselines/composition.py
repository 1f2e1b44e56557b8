"""LoRA Switch and LoRA Composite (arXiv 2402.16843), as samples that the engine runs like any other.

Both treat all adapters alike: there is no preference in them. Rewarded Soup, the third way to compose adapters, is the
engine's method `soup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from blend.baselines.found import check_count
from blend.engine import Sample
from blend.preference import Preference


def switch(sample: Sample, adapters: Sequence[str], *, every: int = 1) -> Sample:
    """Return the sample under LoRA Switch: adapter floor(t / every) mod K at step t = 0, 1, .., in the given order.

    The source's `every` is 5, of 100 to 200 steps. Costs one model's rows. Raises ValueError for every < 1.
    """
    check_count(every, "every")
    preference = _alike(adapters, "ls")
    names = [adapters[step // every % len(adapters)] for step in range(sample.num_inference_steps)]
    return replace(sample, preference=preference, ls_schedule=tuple(names))


def composite(sample: Sample, adapters: Sequence[str]) -> Sample:
    """Return the sample under LoRA Composite: eps = 1/K sum_i [eps_i,unc + g (eps_i,txt - eps_i,unc)] at every step.

    That is DB-MPA at equal weights: same rows, same numbers. What DB-MPA adds is the weights.
    """
    return replace(sample, preference=_alike(adapters, "mpa"))


def _alike(adapters: Sequence[str], method: str) -> Preference:
    return Preference.parse(dict.fromkeys(adapters, 1.0), method=method, basis=adapters, normalize=True)
