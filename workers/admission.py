"""Whether one more request may wait, by forecast seconds of work. Knows neither engine nor HTTP."""

import math
from dataclasses import dataclass

from workers.jobs import QueueFullError

# Of the queue that one client may fill while it has work waiting: the rest is for the others.
CLIENT_SHARE = 0.5
# Rows per second assumed until steps have been measured.
FIRST_GUESS_ROWS_PER_S = 50.0
# Of what was measured before, at each step of a full batch.
FORGETTING = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """UNet rows taken in and not yet computed, of all clients and of the one that asks, and rows per second."""

    rows: float
    own_rows: float
    rows_per_s: float


def late(rows: int, load: Load, *, max_queue_s: float) -> QueueFullError:
    """The refusal of a request that was let in by a forecast which did not hold: the machine has become slower."""
    queued = load.rows / load.rows_per_s
    why = f"the queue is full: the request has waited {max_queue_s:g} s, which is the bound, {queued:.1f} s of work are"
    return _full(f"{why} waiting", rows, load, queued)


def _full(why: str, rows: int, load: Load, wait_s: float) -> QueueFullError:
    wait = max(1, math.ceil(wait_s))
    return QueueFullError(
        f"{why}, and this request needs {rows / load.rows_per_s:.1f} s ({rows} UNet rows at {load.rows_per_s:.0f} a "
        f"second); try again in about {wait} s",
        wait,
    )


class Rate:
    """Rows per second: a mean over time that forgets, in which steps of full batches weigh most.

    A step with few rows says little of what the device can do, but is all there is until it is busy.
    """

    def __init__(self) -> None:
        self._rows, self._seconds = FIRST_GUESS_ROWS_PER_S * 1e-3, 1e-3

    @property
    def rows_per_s(self) -> float:
        return self._rows / self._seconds

    def observe(self, rows: float, seconds: float, *, weight: float) -> None:
        """Take in one step; `weight` in (0, 1] is how full its batch was."""
        keep = 1.0 - FORGETTING * weight
        self._rows = keep * self._rows + weight * max(rows, 1e-3)
        self._seconds = keep * self._seconds + weight * seconds


def check_room(rows: int, load: Load, *, max_queue_s: float, deadline_s: float | None = None) -> None:
    """Raise QueueFullError, with the numbers, when `rows` more do not fit. Who finds nothing waiting always fits."""
    queued, own = load.rows / load.rows_per_s, load.own_rows / load.rows_per_s
    needed = rows / load.rows_per_s
    if queued and queued + needed > max_queue_s:
        why, held, limit = "the queue is full", queued, max_queue_s
    elif own and own + needed > max_queue_s * CLIENT_SHARE:
        why, held, limit = "this client's share of the queue is full", own, max_queue_s * CLIENT_SHARE
    elif queued and deadline_s is not None and queued + needed > deadline_s:
        why, held, limit = "the deadline cannot be met", queued, deadline_s
    else:
        return
    why = f"{why}: {held:.1f} s of work are waiting, of at most {limit:g} s"
    raise _full(why, rows, load, min(held + needed - limit, held))
