"""The weight of the KL: constant, or raised as far as it takes to keep a budget."""

import math
from typing import Any

# in one iteration alpha changes by at most exp(GAIN * LARGEST); measured on sprites, whose KL moves by a tenth a step
GAIN = 2.0
LARGEST = 0.5


class KLControl:
    """alpha of J = E[r] / s - alpha KL: at least `kl_weight`, and higher while the path KL is above `kl_target`.

    The budget is kept as by a Lagrange multiplier: alpha <- max(kl_weight, alpha (KL / target)^GAIN), each step cut to
    a factor of exp(+-GAIN LARGEST). Departure from the controller of RLHF (Ziegler et al., 1909.08593, section 2.2),
    whose alpha follows the KL up and down without a floor and at a tenth of a percent an iteration.

    The target is one of the held-out path KL, which is what a checkpoint is judged by; rollouts may be guided less and
    have another KL. Each iteration counts the rollouts' KL times the ratio of the two that was measured last.
    """

    def __init__(self, kl_weight: float, kl_target: float | None) -> None:
        self.kl_weight = kl_weight
        self.kl_target = kl_target
        self.weight = kl_weight
        self._ratio = 1.0
        self._held_out: float | None = None

    def observe_held_out(self, path_kl: float) -> None:
        """Take down the held-out path KL in nats; the next `step` hears of the same policy."""
        self._held_out = path_kl

    def step(self, path_kl: float) -> float:
        """Return alpha for an iteration whose rollouts have this path KL, in nats."""
        if self.kl_target is None:
            return self.weight
        if self._held_out is not None and path_kl > 0 and self._held_out > 0:
            self._ratio = self._held_out / path_kl
        self._held_out = None
        if path_kl > 0:
            excess = math.log(path_kl * self._ratio / self.kl_target)
            factor = math.exp(GAIN * max(-LARGEST, min(LARGEST, excess)))
            self.weight = max(self.kl_weight, self.weight * factor)
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"weight": self.weight, "ratio": self._ratio, "held_out": self._held_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self.weight, self._ratio, self._held_out = state["weight"], state["ratio"], state["held_out"]
