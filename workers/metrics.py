"""What the endpoint tells of itself while it works; `workers.ray_metrics` exports it. This one takes no notice."""


class Metrics:
    """Hears of everything and keeps nothing."""

    def step(self, *, seconds: float, rows: float, occupancy: float, backlog_s: float) -> None:
        """One denoising step of the whole batch ended; `occupancy` is the share of its row bound that was in use."""

    def answered(self, *, method: str, images: int, queue_s: float) -> None:
        """One request's images are ready."""

    def serving(self, *, name: str, version: int | None, digest: str) -> None:
        """This process answers from that bundle from now on."""

    def request(self, *, route: str, status: int, seconds: float) -> None:
        """One HTTP request was answered."""

    def in_flight(self, count: int) -> None:
        """So many HTTP requests are being answered."""
