"""The rivals by the names they have in run files: best_of_4, code_20_5, rgg_2, switch, composite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from blend.baselines import best_of_n, blockwise, composite, reward_guided, switch
from blend.baselines.found import Found
from blend.engine import BlendEngine, Sample
from blend.rewards import Reward

# Names with what they mean; N, B and S stand for numbers.
FORMS = {
    "best_of_N": "best of N images",
    "code_N_B": "CoDe, the best of N continuations every B steps",
    "rgg_S": "reward gradient guidance of scale S",
    "switch": "LoRA Switch",
    "composite": "LoRA Composite",
}
_PATTERNS = {
    "best_of": re.compile(r"best_of_([1-9]\d{0,3})"),
    "code": re.compile(r"code_([1-9]\d{0,3})_([1-9]\d{0,3})"),
    "rgg": re.compile(r"rgg_(\d{1,6}(?:\.\d{1,6})?)"),
    "switch": re.compile(r"switch"),
    "composite": re.compile(r"composite"),
}
# What one row that is also run backward costs in rows that are not.
BACKWARD = 2.0


@dataclass(frozen=True, slots=True)
class Rival:
    """One rival and its numbers."""

    kind: str
    numbers: tuple[float, ...] = ()

    @property
    def searches(self) -> bool:
        """Whether it looks at the rewards while it draws, starting from the base; the others compose adapters."""
        return self.kind in ("best_of", "code", "rgg")

    @property
    def may_fail(self) -> bool:
        """Whether a sample of it that is not finite is a finding: LoRA Composite is the blend at equal weights."""
        return self.kind != "composite"

    @property
    def needs_gradients(self) -> bool:
        return self.kind == "rgg"

    def forecast(self, steps: int) -> float:
        """Rows of one image over those of a base image of so many steps, for the time left."""
        if self.kind == "best_of":
            return self.numbers[0]
        if self.kind == "code":
            return (1 + self.numbers[0] * (steps - 1)) / steps
        return 1.0 + BACKWARD * self.needs_gradients


def rival_of(method: str) -> Rival | None:
    """The rival of that name; None for what is no rival's, such as the engine's own methods."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(method):
            return Rival(kind, tuple(float(number) for number in found.groups()))
    return None


def parse_rival(name: str) -> Rival:
    """Read a rival's name. ValueError says which there are."""
    rival = rival_of(name)
    if rival is None:
        forms = ", ".join(f"{form} ({meaning})" for form, meaning in FORMS.items())
        raise ValueError(f"unknown rival {name!r}; choose from {forms}, with whole numbers N and B from 1")
    return rival


def composed(rival: Rival, sample: Sample, adapters: Sequence[str]) -> Sample:
    """The sample under a rival that composes adapters: one that the engine runs like any other."""
    return switch(sample, adapters) if rival.kind == "switch" else composite(sample, adapters)


def search(rival: Rival, engine: BlendEngine, samples: Sequence[Sample], reward: Reward) -> list[Found]:
    """Run a rival that looks at the reward, for samples of the base."""
    numbers = rival.numbers
    if rival.kind == "best_of":
        return best_of_n(engine, samples, reward, int(numbers[0]))
    if rival.kind == "code":
        return blockwise(engine, samples, reward, n=int(numbers[0]), block=int(numbers[1]))
    return reward_guided(engine, samples, reward, scale=numbers[0], normalise=True)
