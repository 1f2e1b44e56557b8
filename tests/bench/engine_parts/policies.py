"""Two ways to batch the requests of many users over the same engine: in flight, and by whole requests.

Every session has a clock of its own that runs only while the session does, so that sessions can take turns on one
machine in slices of a fraction of a second and meet the same noise.
"""

import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine_parts.workload import Workload

from blend.engine import BlendEngine

STEPS = (3, 30)  # of a request: from a tenth to the whole, each as often
SLICE_S = 0.5


@dataclass(slots=True)
class Request:
    index: int
    steps: int
    arrived: float = 0.0  # on its session's clock


class InFlight:
    """Requests join at the next step and leave when they end: the engine's own way."""

    def __init__(self, workload: Workload, max_rows: int) -> None:
        self._workload = workload
        self._engine = workload.fresh_engine(max_rows)
        self._requests: dict[int, Request] = {}

    @property
    def idle(self) -> bool:
        return self._engine.idle

    @property
    def at_boundary(self) -> bool:
        """True where the work done and the time spent can be compared."""
        return True

    def submit(self, request: Request) -> None:
        self._requests[self._engine.submit(self._workload.sample(request.index, request.steps))] = request

    def step(self) -> tuple[int, list[Request]]:
        """Return (steps of requests done, requests answered)."""
        finished = [self._requests.pop(ticket) for ticket in self._engine.step()]
        return sum(request.steps for request in finished), finished

    def steps_under_way(self) -> int:
        """Steps already done of requests not yet answered."""
        return sum(self._engine.progress(ticket)[0] for ticket in self._requests)


class WholeRequests:
    """As `@serve.batch`: takes the waiting requests that fit, and answers all when the longest has ended.

    The rows, tiles and row cap are the engine's own. pad=True keeps an ended request's rows in the batch, whose
    tensors have one shape until its end; pad=False lets them go, which is kinder than such a batch can be.
    A batch starts as soon as one request waits.
    """

    def __init__(self, workload: Workload, max_rows: int, *, pad: bool = True) -> None:
        self._workload = workload
        self._engine: BlendEngine = workload.fresh_engine(max_rows)
        self._size = max_rows // workload.rows
        self._pad = pad
        self._waiting: deque[Request] = deque()
        self._batch: list[Request] = []
        self._left = 0

    @property
    def idle(self) -> bool:
        return not self._batch and not self._waiting

    @property
    def at_boundary(self) -> bool:
        return not self._batch

    def steps_under_way(self) -> int:
        return 0  # it is measured between batches

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> tuple[int, list[Request]]:
        if not self._batch:
            self._batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            self._left = max(request.steps for request in self._batch)
            for request in self._batch:
                self._engine.submit(self._workload.sample(request.index, request.steps))
        ended = len(self._engine.step())
        self._left -= 1
        if self._left == 0:
            answered, self._batch = self._batch, []
            return sum(request.steps for request in answered), answered
        for _ in range(ended if self._pad else 0):
            self._engine.submit(self._workload.sample(0, self._left))
        return 0, []


Server = InFlight | WholeRequests


@dataclass
class Session:
    """One server under a load: `clients` that each ask again once answered, or Poisson arrivals at `rate` per s."""

    server: Server
    clients: int = 0
    rate: float = 0.0
    clock: float = 0.0
    useful: int = 0  # steps of answered requests
    answered: int = 0
    latencies: list[float] = field(default_factory=list)
    measured: float = 0.0  # `clock` when `useful` was last up to date
    bursts: list[float] = field(default_factory=list)  # useful steps per second between one boundary and the next
    _last: float = 0.0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _began: float | None = None

    def __post_init__(self) -> None:
        self._lengths = _lengths()
        self._gaps = random.Random("arrivals")
        self._next_arrival = 0.0 if self.rate else float("inf")
        for _ in range(self.clients):
            self._ask(0.0)

    def advance(self, seconds: float) -> None:
        """Serve for so long on the session's own clock."""
        until = self.clock + seconds
        while self.clock < until:
            if self.server.idle:
                self.clock = max(self.clock, self._next_arrival)
            while self._next_arrival <= self.clock:
                self._ask(self._next_arrival)
                self._next_arrival += self._gaps.expovariate(self.rate)
            self._step()

    def restart_figures(self) -> None:
        """Forget what was measured; the load goes on."""
        self._began = None

    def _step(self) -> None:
        if self._began is None and self.server.at_boundary:
            self._began = self.clock
            self._last = self.measured = self.clock
            self.useful, self.answered, self.latencies, self.bursts = -self.server.steps_under_way(), 0, [], []
        began = time.perf_counter()
        useful, answered = self.server.step()
        self.clock += time.perf_counter() - began
        self.useful += useful
        self.answered += len(answered)
        self.latencies += [self.clock - request.arrived for request in answered]
        if self.server.at_boundary:
            self.measured = self.clock
            if useful:
                self.bursts.append(useful / (self.clock - self._last))
                self._last = self.clock
        for _ in answered if self.clients else ():
            self._ask(self.clock)

    def _ask(self, now: float) -> None:
        began = time.perf_counter()
        self.server.submit(Request(next(self._numbers), next(self._lengths), now))
        self.clock += time.perf_counter() - began

    def figures(self) -> dict[str, float]:
        """Throughput and latency; a batch that has not ended counts for nothing."""
        # on a busy machine a batch may take longer than all of its turns
        while self._began is None or not self.latencies:
            self.advance(SLICE_S)
        seconds = self.measured - (self._began or 0.0)
        useful = self.useful + self.server.steps_under_way()
        ordered = sorted(self.latencies)
        return {
            "sample_steps_per_s": round(useful / seconds, 2),
            "requests_per_s": round(self.answered / seconds, 4),
            "requests": self.answered,
            "latency_p50_s": round(statistics.median(ordered), 3),
            "latency_p95_s": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
        }


def _lengths() -> Iterator[int]:
    """Steps of request after request: the same for every session, each length once before one comes again."""
    draws = random.Random("lengths")
    deck = list(range(STEPS[0], STEPS[1] + 1))
    while True:
        draws.shuffle(deck)
        yield from deck


def take_turns(sessions: dict[str, Session], seconds: float) -> None:
    """Let every session serve for `seconds` of its own clock, in slices."""
    for turn in range(round(seconds / SLICE_S)):
        # the order turns as well: none always runs after the same neighbour
        names = list(sessions)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sessions[name].advance(SLICE_S)
