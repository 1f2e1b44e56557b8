"""What the processes of one Ray run tell each other: an actor between workers, controller and driver.

Its process imports this module, so that it must not lead to the model's code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.actor import ActorHandle

from blend.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from blend.finetune.held_out import Metrics

# a crashed worker group starts again from the last checkpoint, so often in a row without one more iteration kept
MAX_FAILURES = 3


class Board:
    """Metrics and errors to the driver, the wish to stop to the workers, and the count of crashes."""

    def __init__(self, announced: int = -1) -> None:
        """`announced` is the last iteration whose metrics the driver has shown before."""
        self._announced = announced
        self._kept = -1
        self._failures = 0
        self._failure = ""
        self._error: FinetuneError | None = None
        self._stopping = False
        self._metrics: list[Metrics] = []
        self._workers: dict[int, ActorHandle] = {}

    # ---- workers

    def enter(self, rank: int, worker: ActorHandle) -> bool:
        """A worker of a new group begins; False when it need not."""
        self._workers[rank] = worker
        return not self.over()

    def keep(self, iteration: int) -> None:
        """A checkpoint of this iteration is there: what is newer than the last one known is progress."""
        if iteration > self._kept:
            self._kept, self._failures = iteration, 0

    def post(self, metrics: Metrics) -> None:
        """An iteration is done; one that a restarted group repeats is announced no second time."""
        if metrics["iteration"] > self._announced:
            self._announced = metrics["iteration"]
            self._metrics.append(metrics)

    def fail(self, error: FinetuneError) -> None:
        """The run must not go on; the first reason given is the one that counts."""
        self._error = self._error or error

    def over(self) -> bool:
        """Whether workers should stop as soon as they can."""
        return self._stopping or self._error is not None

    # ---- controller

    def crash(self, failure: str) -> bool:
        """A worker died; whether to start no new group."""
        self._failures += 1
        self._failure = failure
        return self.over() or self._failures >= MAX_FAILURES

    # ---- driver

    def request_stop(self) -> None:
        self._stopping = True

    def drain(self) -> tuple[list[Metrics], FinetuneError | None]:
        """Metrics posted since the last call, and the error that ended the run if there is one."""
        metrics, self._metrics = self._metrics, []
        return metrics, self._error

    def failure(self) -> str:
        """What the last worker died of."""
        return self._failure

    def workers(self) -> list[ActorHandle]:
        """The newest group's."""
        return list(self._workers.values())
