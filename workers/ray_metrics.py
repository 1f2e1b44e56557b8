"""The endpoint's figures, exported to Prometheus by the agent that Ray runs on every machine.

Ray puts `ray_` before each name, and `_total` behind counters.
"""

from ray.util.metrics import Counter, Gauge, Histogram

from workers.metrics import Metrics

PREFIX = "diffusion_blend"
QUEUE_BOUNDARIES_S = [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60]
STEP_BOUNDARIES_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
REQUEST_BOUNDARIES_S = [0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120]


class RayMetrics(Metrics):
    """Exports through Ray; build it in a Ray process."""

    def __init__(self) -> None:
        self._steps = Histogram(f"{PREFIX}_step_seconds", "Seconds of one denoising step", STEP_BOUNDARIES_S)
        self._rows = Counter(f"{PREFIX}_rows", "UNet rows computed")
        self._occupancy = Gauge(f"{PREFIX}_batch_occupancy", "Share of the row bound in use at the last step")
        self._backlog = Gauge(f"{PREFIX}_backlog_seconds", "Forecast seconds of work taken in and not yet done")
        self._queue = Histogram(f"{PREFIX}_queue_seconds", "Seconds before a request's first step", QUEUE_BOUNDARIES_S)
        self._images = Counter(f"{PREFIX}_images", "Images made", ("method",))
        self._answers = Counter(f"{PREFIX}_answers", "Requests answered with images", ("method",))
        self._bundle = Gauge(f"{PREFIX}_bundle", "1 for the bundle that is served", ("name", "version", "digest"))
        self._requests = Counter(f"{PREFIX}_requests", "HTTP requests", ("route", "status"))
        self._seconds = Histogram(f"{PREFIX}_request_seconds", "HTTP seconds", REQUEST_BOUNDARIES_S, ("route",))
        self._in_flight = Gauge(f"{PREFIX}_requests_in_flight", "HTTP requests being answered")
        self._served: dict[str, str] | None = None

    def step(self, *, seconds: float, rows: float, occupancy: float, backlog_s: float) -> None:
        self._steps.observe(seconds)
        self._rows.inc(max(rows, 1e-9))
        self._occupancy.set(occupancy)
        self._backlog.set(backlog_s)

    def answered(self, *, method: str, images: int, queue_s: float) -> None:
        self._answers.inc(1, {"method": method})
        self._images.inc(images, {"method": method})
        self._queue.observe(queue_s)

    def serving(self, *, name: str, version: int | None, digest: str) -> None:
        if self._served is not None:
            self._bundle.set(0, self._served)
        self._served = {"name": name, "version": str(version or ""), "digest": digest}
        self._bundle.set(1, self._served)

    def request(self, *, route: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-9), {"route": route})

    def in_flight(self, count: int) -> None:
        self._in_flight.set(count)
