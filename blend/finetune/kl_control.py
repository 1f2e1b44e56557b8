"""The weight of the KL: constant, or raised as far as it takes to keep a budget."""

import math
from typing import Any

# alpha follows the KL that HORIZON more iterations of the present trend would lead to, since the optimiser's momentum
# carries the policy on. The distance from the base, the root of the KL, is what grows steadily.
GAIN, LARGEST = 0.25, 2.0
HORIZON = 16.0
SMOOTHING = 0.3  # weight of the newest measurement: a few prompts make it noisy


class KLControl:
    """alpha of J = E[r] / s - alpha KL: at least `kl_weight`, and higher while the path KL is above `kl_target`.

    The budget is kept as by a Lagrange multiplier: alpha <- max(kl_weight, alpha (KL / target)^GAIN), with the KL taken
    a little ahead and each step cut to a factor of exp(+-GAIN LARGEST). Departure from the controller of RLHF (Ziegler
    et al., 1909.08593, section 2.2), whose alpha follows the KL without a floor and by at most 2 % an iteration.

    The target is one of the held-out path KL, which is what a checkpoint is judged by; rollouts may be guided less and
    have another KL. Each iteration counts the rollouts' KL times the ratio of the two that was measured last.
    """

    def __init__(self, kl_weight: float, kl_target: float | None) -> None:
        self.kl_weight = kl_weight
        self.kl_target = kl_target
        self.weight = kl_weight
        self._ratio = 1.0  # held-out KL over that of the rollouts
        self._held_out: float | None = None
        self._distance: float | None = None  # root of the rollouts' path KL, smoothed

    def observe_held_out(self, path_kl: float) -> None:
        """Take down the held-out path KL in nats; the next `step` hears of the same policy."""
        self._held_out = path_kl

    def step(self, path_kl: float) -> float:
        """Return alpha for an iteration whose rollouts have this path KL, in nats."""
        held_out, self._held_out = self._held_out, None
        if self.kl_target is None or path_kl <= 0:
            return self.weight
        if held_out is not None and held_out > 0:
            self._ratio = held_out / path_kl
        latest = math.sqrt(path_kl)
        before = latest if self._distance is None else self._distance
        self._distance = before + SMOOTHING * (latest - before)
        ahead = max(self._distance + HORIZON * (self._distance - before), 1e-6)
        excess = math.log(ahead**2 * self._ratio / self.kl_target)
        self.weight = max(self.kl_weight, self.weight * math.exp(GAIN * max(-LARGEST, min(LARGEST, excess))))
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"weight": self.weight, "ratio": self._ratio, "held_out": self._held_out, "distance": self._distance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self.weight, self._ratio, self._held_out = state["weight"], state["ratio"], state["held_out"]
        self._distance = state["distance"]
