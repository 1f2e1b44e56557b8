"""Groups that wait for the engine, taken so that every client gets the same share of it.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) over UNet rows: each client has a clock that advances by the rows
it was given, the client whose clock is behind comes next, and one that was away does not save up.
Not thread-safe. Knows no engine.
"""

from collections import deque

from workers.jobs import Job


class FairQueue:
    """First come, first served within a client; fair between clients."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Job]] = {}
        self._clocks: dict[str, float] = {}  # rows given to each client, by a time that all share
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, job: Job) -> None:
        if job.client not in self._waiting:
            self._waiting[job.client] = deque()
            self._clocks[job.client] = max(self._clocks.get(job.client, 0.0), self._now)
        self._waiting[job.client].append(job)

    def head(self) -> Job | None:
        """The group whose turn it is; it stays until it is removed."""
        if not self._waiting:
            return None
        client = min(self._waiting, key=lambda name: (self._clocks[name], self._waiting[name][0].arrived))
        return self._waiting[client][0]

    def charge(self, job: Job, rows: float) -> None:
        """Count `rows` as given to the client of a group that waits."""
        self._now = max(self._now, self._clocks[job.client])
        self._clocks[job.client] += rows

    def remove(self, job: Job) -> None:
        """Take a group out, if it is in."""
        group = self._waiting.get(job.client)
        if group is None or job not in group:
            return
        group.remove(job)
        if not group:
            del self._waiting[job.client]
        # who is away needs a clock only while it is ahead of someone who waits
        self._clocks = {
            name: clock
            for name, clock in self._clocks.items()
            if self._waiting and (name in self._waiting or clock > self._now)
        }
