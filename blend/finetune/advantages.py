"""From rewards to advantages. Rewards come in units of the base's standard deviation (see objectives)."""

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

# advantages beyond this many base standard deviations are cut, as in ddpo-pytorch (adv_clip_max)
ADVANTAGE_LIMIT = 5.0
EPSILON = 1e-6


def standardise(rewards: Tensor, base_mean: float, base_std: float) -> Tensor:
    """(r - base mean) / base std, [N]: the unit in which kl_weight is alpha."""
    return (rewards - base_mean) / max(base_std, EPSILON)


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """r - mean of its group, [N]; groups [N] are integers. GRPO (arXiv 2402.03300).

    Departure: not divided by the group's std, as Dr. GRPO argues (2503.20783); it would make alpha vary.
    """
    size = int(groups.max()) + 1
    counts = torch.zeros(size, dtype=rewards.dtype).index_add_(0, groups, torch.ones_like(rewards))
    sums = torch.zeros(size, dtype=rewards.dtype).index_add_(0, groups, rewards)
    return rewards - (sums / counts.clamp_min(1))[groups]


def limit(advantages: Tensor) -> Tensor:
    """Cut advantages to +-ADVANTAGE_LIMIT."""
    return advantages.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)


class PromptStatistics:
    """Running mean and std of a prompt's last `window` rewards: DDPO (arXiv 2305.13301), section 5.

    A prompt seen fewer than `minimum` times uses the current batch's statistics. Dividing by the std is
    DDPO's rule: with this baseline kl_weight counts per-prompt standard deviations.
    """

    def __init__(self, window: int = 32, minimum: int = 8) -> None:
        self.window = window
        self.minimum = minimum
        self._history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=window))

    def advantages(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """Record the batch and return (r - mean) / std per sample, [N]."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._history[prompt].append(reward)
        batch = (rewards.mean(), rewards.std(correction=0))
        statistics = {p: self._statistics(p, rewards, batch) for p in set(prompts)}
        mean = torch.stack([statistics[p][0] for p in prompts])
        std = torch.stack([statistics[p][1] for p in prompts])
        return (rewards - mean) / (std + EPSILON)

    def _statistics(self, prompt: str, rewards: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        history = self._history[prompt]
        if len(history) < self.minimum:
            return batch
        values = rewards.new_tensor(list(history))
        return values.mean(), values.std(correction=0)

    def state_dict(self) -> dict[str, list[float]]:
        """Prompt -> its remembered rewards, oldest first."""
        return {prompt: list(values) for prompt, values in self._history.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore what state_dict gave."""
        self._history.clear()
        for prompt, values in state.items():
            self._history[prompt].extend(values)
