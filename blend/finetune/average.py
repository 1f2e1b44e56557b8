"""The adapter that is evaluated and published: an average over the latest iterations of the one in training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ParameterAverage:
    """Exponential moving average of parameters; the plain mean of all of them while these are few.

    Steps of policy gradient are mostly noise. It makes the adapter wander, which costs path KL and earns no reward, and
    averages out.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        """decay in [0, 1): the weight of what was averaged so far; 0 keeps the latest parameters."""
        self._parameters = parameters
        self._decay = decay
        self._count = 0
        self._average = [parameter.detach().clone() for parameter in parameters]

    def update(self) -> None:
        """Take in the parameters as they are now."""
        decay = min(self._decay, self._count / (self._count + 1))
        self._count += 1
        with torch.no_grad():
            for average, parameter in zip(self._average, self._parameters, strict=True):
                average.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters have their averages' values."""
        latest = [parameter.detach().clone() for parameter in self._parameters]
        self._set(self._average)
        try:
            yield
        finally:
            self._set(latest)

    def copies(self) -> list[Tensor]:
        """The averages."""
        return [average.clone() for average in self._average]

    def restart(self, values: Sequence[Tensor]) -> None:
        """Set parameters and averages to `values`."""
        self._set(values)
        self._count = 0
        self.update()

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"count": self._count, "average": [average.cpu() for average in self._average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self._count = state["count"]
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)
