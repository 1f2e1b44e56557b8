"""The endpoint's figures, exported to Prometheus by the agent that Ray runs on every machine.

Ray puts `ray_` before each name, and `_total` behind counters. Of a histogram it passes on which bucket a value fell
into, so that sums and means are those of the buckets' middles.
"""

import threading
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from workers.metrics import Metrics

PREFIX = "diffusion_blend"
# Ray forgets a gauge that is not set for 20 seconds.
REPEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric: what it is, in words, and the labels it has. A histogram has the upper bounds of its buckets."""

    kind: type[Counter | Gauge | Histogram]
    text: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    def build(self, name: str) -> Any:
        if self.kind is Histogram:
            return Histogram(f"{PREFIX}_{name}", self.text, list(self.boundaries), self.labels)
        return self.kind(f"{PREFIX}_{name}", self.text, self.labels)


DECLARED = {
    "requests": Declared(Counter, "HTTP requests answered; status 499: the client left", ("route", "status")),
    "request_seconds": Declared(
        Histogram,
        "Seconds of an HTTP request",
        ("route", "status"),
        (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120),
    ),
    "requests_in_flight": Declared(Gauge, "HTTP requests being answered"),
    "answers": Declared(Counter, "Requests answered with images", ("method",)),
    "images": Declared(Counter, "Images made", ("method",)),
    "queue_seconds": Declared(
        Histogram, "Seconds before a request's first step", (), (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60)
    ),
    "backlog_seconds": Declared(Gauge, "Forecast seconds of work taken in and not yet done"),
    "rows": Declared(Counter, "UNet rows computed"),
    "step_seconds": Declared(
        Histogram, "Seconds of one denoising step", (), (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    ),
    "batch_occupancy_ratio": Declared(
        Histogram, "Share of the row bound in use at a step", (), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    ),
    "bundle_info": Declared(Gauge, "1 for the bundle that is served", ("name", "version", "digest")),
}


class RayMetrics(Metrics):
    """Exports through Ray; build it in a Ray process."""

    def __init__(self) -> None:
        self._metrics = {name: declared.build(name) for name, declared in DECLARED.items()}
        self._gauges: dict[str, tuple[float, dict[str, str]]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._repeat, name="blend-gauges", daemon=True).start()

    def step(self, *, seconds: float, rows: float, occupancy: float, backlog_s: float) -> None:
        self._metrics["step_seconds"].observe(seconds)
        if rows > 0:
            self._metrics["rows"].inc(rows)
        self._metrics["batch_occupancy_ratio"].observe(occupancy)
        self._set("backlog_seconds", backlog_s)

    def answered(self, *, method: str, images: int, queue_s: float) -> None:
        self._metrics["answers"].inc(1, {"method": method})
        self._metrics["images"].inc(images, {"method": method})
        self._metrics["queue_seconds"].observe(queue_s)

    def serving(self, *, name: str, version: int | None, digest: str) -> None:
        with self._lock:
            if "bundle_info" in self._gauges:
                self._metrics["bundle_info"].set(0, self._gauges.pop("bundle_info")[1])
        self._set("bundle_info", 1, {"name": name, "version": str(version or ""), "digest": digest})

    def request(self, *, route: str, status: int, seconds: float) -> None:
        labels = {"route": route, "status": str(status)}
        self._metrics["requests"].inc(1, labels)
        self._metrics["request_seconds"].observe(seconds, labels)

    def in_flight(self, count: int) -> None:
        self._set("requests_in_flight", count)

    def _set(self, name: str, value: float, labels: dict[str, str] | None = None) -> None:
        with self._lock:
            self._gauges[name] = (value, labels or {})
            self._metrics[name].set(value, labels)

    def _repeat(self) -> None:
        pause = threading.Event()
        while not pause.wait(REPEAT_S):
            with self._lock:
                for name, (value, labels) in self._gauges.items():
                    self._metrics[name].set(value, labels)
