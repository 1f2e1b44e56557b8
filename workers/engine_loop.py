"""Drives a BlendEngine from a thread of its own: many callers, one in-flight batch.

Callers hand in groups of samples (the images of one request) from any thread or event loop and may take them
back while they run; torch never runs on an event loop. Finished groups are decoded in a second thread, so that
the next denoising step need not wait for the picture. Knows neither HTTP nor Ray.
"""

import asyncio
import concurrent.futures
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from blend.engine import BlendEngine, DenoisingError, Output, Sample
from workers.images import to_uint8

log = logging.getLogger(__name__)

# Rows per second assumed until the first step has been measured; only Retry-After depends on it.
FIRST_GUESS_ROWS_PER_S = 50.0


class QueueFullError(Exception):
    """No room for `rows` more UNet rows: `queued` of at most `limit` wait. `retry_after_s` is a forecast."""

    def __init__(self, rows: int, queued: int, limit: int, retry_after_s: int) -> None:
        super().__init__(rows, queued, limit, retry_after_s)
        self.rows, self.queued, self.limit, self.retry_after_s = rows, queued, limit, retry_after_s

    def __str__(self) -> str:
        return (
            f"the queue is full: {self.queued} of at most {self.limit} UNet rows are waiting and this "
            f"request needs {self.rows}; try again in about {self.retry_after_s} s"
        )


class EngineFaultError(RuntimeError):
    """The engine failed while it worked on this request; the cause is in the service's log."""


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
    """A group on its way. `left` is the forecast of UNet rows still to compute."""

    samples: Sequence[Sample]
    rows: int
    left: float
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    tickets: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, Output] = field(default_factory=dict)
    future: "concurrent.futures.Future[Finished]" = field(default_factory=concurrent.futures.Future)


class EngineLoop:
    """Owns `engine`: after construction no one else may call it. Forecast work is bounded."""

    def __init__(self, engine: BlendEngine, *, max_queued_rows: int) -> None:
        self.max_queued_rows = max_queued_rows
        self.fault: str | None = None
        self.counts = {"finished": 0, "aborted": 0, "failed": 0}
        self._engine = engine
        self._orders: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._owner: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._rows_per_s = FIRST_GUESS_ROWS_PER_S
        self._closing = False
        self._decoder = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="blend-decode")
        self._thread = threading.Thread(target=self._run, name="blend-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Groups taken in and not yet answered, failed or aborted."""
        return len(self._jobs)

    def enter(self, samples: Sequence[Sample], rows: int) -> Job:
        """Take a group in that will need `rows`. QueueFullError if it does not fit; an empty queue takes any."""
        with self._lock:
            queued = math.ceil(sum(job.left for job in self._jobs))
            if queued and queued + rows > self.max_queued_rows:
                excess = queued + rows - self.max_queued_rows
                wait = math.ceil(min(excess, queued) / self._rows_per_s)
                raise QueueFullError(rows, queued, self.max_queued_rows, max(1, wait))
            job = Job(samples, rows, float(rows))
            self._jobs.add(job)
        self._orders.put(("submit", job))
        if not self.alive:
            self._fail_all(EngineFaultError("the engine thread has ended"))
        return job

    def leave(self, job: Job) -> None:
        """Give a group up; its rows are free from the next step on."""
        self._orders.put(("abort", job))

    async def generate(self, samples: Sequence[Sample], rows: int) -> Finished:
        """`enter` and await the images; cancelling the awaiting task aborts the group."""
        job = self.enter(samples, rows)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            self.leave(job)
            raise

    def close(self) -> None:
        """End both threads; groups still in flight fail."""
        self._closing = True
        self._orders.put(("close", None))
        self._thread.join()
        self._decoder.shutdown()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_orders(wait=self._engine.idle)
                if not self._engine.idle:
                    self._advance()
            self._fail_all(EngineFaultError("the service is shutting down"))
        except BaseException as error:
            log.exception("the engine thread has ended")
            self.fault = f"the engine thread has ended: {type(error).__name__}"
            self._fail_all(EngineFaultError(self.fault))

    def _take_orders(self, *, wait: bool) -> None:
        while True:
            try:
                kind, job = self._orders.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if job is not None and kind == "submit":
                self._submit(job)
            elif job is not None and job in self._jobs:
                self.counts["aborted"] += 1
                self._abort(job)

    def _submit(self, job: Job) -> None:
        if job.future.cancelled():
            self._forget(job)
            return
        try:
            for index, sample in enumerate(job.samples):
                ticket = self._engine.submit(sample)
                job.tickets[ticket] = index
                self._owner[ticket] = job
        except Exception as error:
            self._abort(job)
            self._fail(job, error)

    def _abort(self, job: Job) -> None:
        for ticket in job.tickets:
            if self._owner.pop(ticket, None) is not None:
                self._engine.abort(ticket)
        self._forget(job)

    def _advance(self) -> None:
        began = time.perf_counter()
        try:
            finished = self._engine.step()
        except Exception as error:
            log.exception("a denoising step failed")
            self.fault = f"the last denoising step failed: {type(error).__name__}"
            for job in set(self._owner.values()):
                self._abort(job)
                self._fail(job, EngineFaultError("the engine failed on this batch"))
            return
        self._account(began, finished)
        failed = [output.error for output in finished.values() if _is_fault(output.error)]
        if failed:
            log.error("a denoising step failed", exc_info=failed[0])
        self.fault = f"the last denoising step failed: {type(failed[0]).__name__}" if failed else None
        for ticket, output in finished.items():
            self._deliver(ticket, output)

    def _account(self, began: float, finished: dict[int, Output]) -> None:
        """Update what is left of every group, and the row rate, after a step that began at `began`."""
        done = 0.0
        for job in set(self._owner.values()):
            left = 0.0
            for ticket in job.tickets:
                if ticket in self._owner and ticket not in finished:
                    step, total = self._engine.progress(ticket)
                    left += job.rows / len(job.samples) * (total - step) / total
                    started = step > 0
                else:
                    started = True
                if started and job.started is None:
                    job.started = began
            done += job.left - left
            job.left = left
        rate = done / max(time.perf_counter() - began, 1e-6)
        if rate > 0:
            self._rows_per_s += 0.2 * (rate - self._rows_per_s)

    def _deliver(self, ticket: int, output: Output) -> None:
        job = self._owner.pop(ticket, None)
        if job is None:
            return
        if output.error is not None:
            self._abort(job)
            fault = EngineFaultError("the engine failed on this batch")
            self._fail(job, fault if _is_fault(output.error) else output.error)
            return
        job.outputs[job.tickets[ticket]] = output
        if len(job.outputs) == len(job.samples):
            self._decoder.submit(self._decode, job, time.perf_counter())

    def _decode(self, job: Job, denoised: float) -> None:
        try:
            outputs = [job.outputs[index] for index in range(len(job.samples))]
            with torch.inference_mode():
                images = self._engine.decode([output.latents for output in outputs])
            pixels = to_uint8(images.float().cpu().numpy())
            started = job.started or job.arrived
            finished = Finished(
                images=pixels,
                rows=sum(output.rows for output in outputs),
                queue_ms=1e3 * (started - job.arrived),
                denoise_ms=1e3 * (denoised - started),
                decode_ms=1e3 * (time.perf_counter() - denoised),
            )
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_result(finished)
                self.counts["finished"] += 1
        except Exception as error:
            log.exception("decoding failed")
            self.fault = f"the last decoding failed: {type(error).__name__}"
            self._fail(job, EngineFaultError("the engine failed on this image"))
        finally:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, set()
        self._owner.clear()
        for job in jobs:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
            self.counts["failed"] += 1


def _is_fault(error: Exception | None) -> bool:
    """Whether an output's error is the engine's own; a sample that diverged was asked for."""
    return error is not None and not isinstance(error, DenoisingError)
