"""What a part of the benchmark hands back."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from endpoint_parts.traffic import NO_ANSWER, Answer


@dataclass(frozen=True, slots=True)
class Outcome:
    """Every answer of a part, its figures, and the promises that it found broken."""

    answers: Sequence[Answer]
    figures: dict[str, Any]
    wrong: Sequence[str] = field(default_factory=list)

    @property
    def errors_5xx(self) -> int:
        """Answers of the server's own failing, and those that did not come."""
        return len(self._failures())

    def complaints(self) -> list[str]:
        """Broken promises, and the words of the first few failures."""
        return [*self.wrong, *(f"{answer.status}: {answer.message[:300]}" for answer in self._failures()[:5])]

    def _failures(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == NO_ANSWER or answer.status >= 500]


def by_status(answers: Sequence[Answer]) -> dict[str, int]:
    return {str(status): number for status, number in sorted(Counter(a.status for a in answers).items())}


def percentile(values: Sequence[float], rank: float) -> float | None:
    """None of nothing."""
    return round(float(np.percentile(values, rank)), 3) if len(values) else None
