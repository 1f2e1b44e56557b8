"""What the engine's loop works on, what it tells meanwhile, and why it may refuse or fail."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from blend.engine import Output, Sample


class QueueFullError(Exception):
    """No room for more work now. `retry_after_s` is a forecast; the message holds the numbers."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class DeadlineError(Exception):
    """The caller's deadline passed before the images were ready."""


class EngineFaultError(RuntimeError):
    """The engine failed while it worked on this request; the cause is in the service's log."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """UNet rows that a group of samples will run: over all their steps, and at most in one step of one sample."""

    rows: int
    peak_rows: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps done by every sample of the group, of its `total`."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What sample `image` of the group would be by its latest step: the `index`-th preview, uint8 [H, W, 3]."""

    image: int
    index: int
    step: int
    total: int
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Finished:
    """One group's images, uint8 [n, H, W, 3] in the order of its samples, and what they took."""

    images: np.ndarray
    rows: int
    queue_ms: float
    denoise_ms: float
    decode_ms: float


@dataclass(eq=False, slots=True)
class Job:
    """A group of samples on its way. `left` is the forecast of UNet rows still to compute."""

    samples: Sequence[Sample]
    forecast: Forecast
    client: str = ""
    deadline: float | None = None  # by time.perf_counter
    start_by: float | None = None  # likewise; given up if it has not begun by then
    probe: bool = False  # the health check's own row, which is in no one's way
    # called from the engine's threads; must return at once
    listener: Callable[[Progress | Preview], None] | None = None
    previews: int = 0  # of each sample
    left: float = 0.0
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    told: int = 0  # the step that the listener heard of last
    tickets: dict[int, int] = field(default_factory=dict)  # of the samples handed to the engine so far
    outputs: dict[int, Output] = field(default_factory=dict)
    future: "concurrent.futures.Future[Finished]" = field(default_factory=concurrent.futures.Future)

    def __post_init__(self) -> None:
        self.left = float(self.forecast.rows)

    @property
    def rows_per_sample(self) -> float:
        return self.forecast.rows / len(self.samples)

    @property
    def denoised(self) -> bool:
        return len(self.outputs) == len(self.samples)

    def tell(self, what: Progress | Preview) -> None:
        """Let the listener know, unless the group has ended."""
        if self.listener is not None and not self.future.done():
            self.listener(what)

    def preview_at(self, step: int, total: int) -> int | None:
        """Which preview is due after `step` of `total` steps, if any; they are spread evenly before the end."""
        due = [round(total * (index + 1) / (self.previews + 1)) for index in range(self.previews)]
        return due.index(step) if 0 < step < total and step in due else None
