"""Drives a BlendEngine from a thread of its own: many callers, one in-flight batch.

Callers hand in groups of samples (the images of one request) from any thread or event loop and may take them
back while they run; torch never runs on an event loop. A group waits in a fair queue and is handed to the engine
sample by sample, as rows become free. Finished groups are decoded in a second thread, so that the next denoising step
need not wait for the picture. Knows neither HTTP nor Ray.
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blend.engine import BlendEngine, DenoisingError, Output, Sample
from workers.admission import Load, Rate, check_room, late
from workers.fair_queue import FairQueue
from workers.images import to_uint8
from workers.jobs import DeadlineError, EngineFaultError, Finished, Forecast, Job, Preview, Progress
from workers.metrics import Metrics

log = logging.getLogger(__name__)


class EngineLoop:
    """Owns `engine`: after construction no one else may call it. Forecast seconds of work are bounded."""

    def __init__(self, engine: BlendEngine, *, max_queue_s: float, metrics: Metrics | None = None) -> None:
        self.max_queue_s = max_queue_s
        self.fault: str | None = None
        self.counts = {"finished": 0, "aborted": 0, "failed": 0}
        self.stepped_at = time.perf_counter()  # when the engine's thread was last seen to get on
        self._rate = Rate()
        self._engine = engine
        self._max_rows = engine.free_rows
        self._metrics = metrics or Metrics()
        self._orders: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._queue = FairQueue()
        self._owner: dict[int, Job] = {}
        self._lock = threading.Lock()
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

    @property
    def rows_per_s(self) -> float:
        """UNet rows per second as measured of late, full batches counting most."""
        return self._rate.rows_per_s

    @property
    def backlog_s(self) -> float:
        """Forecast seconds of the work taken in and not yet done."""
        return self._left() / self.rows_per_s

    def enter(
        self,
        samples: Sequence[Sample],
        forecast: Forecast,
        *,
        client: str = "",
        deadline_s: float | None = None,
        admitted: bool = False,
        probe: bool = False,
        listener: Callable[[Progress | Preview], None] | None = None,
        previews: int = 0,
    ) -> Job:
        """Take a group in. QueueFullError if it does not fit, unless it was `admitted`; an empty queue takes any."""
        job = Job(samples, forecast, client=client, probe=probe, listener=listener, previews=previews)
        if deadline_s is not None:
            job.deadline = job.arrived + deadline_s
        with self._lock:
            if not (admitted or probe):
                job.start_by = job.arrived + self.max_queue_s
                check_room(forecast.rows, self._load(client), max_queue_s=self.max_queue_s, deadline_s=deadline_s)
            self._jobs.add(job)
        self._orders.put(("submit", job))
        if not self.alive:
            self._fail_all(EngineFaultError("the engine thread has ended"))
        return job

    def leave(self, job: Job) -> None:
        """Give a group up; its rows are free from the next step on."""
        self._orders.put(("abort", job))

    async def finish(self, job: Job) -> Finished:
        """Await a group's images; cancelling the awaiting task aborts the group."""
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

    def _left(self, client: str | None = None) -> float:
        return sum(job.left for job in list(self._jobs) if not job.probe and client in (None, job.client))

    def _load(self, client: str) -> Load:
        return Load(self._left(), self._left(client), self.rows_per_s)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_orders(wait=self._engine.idle and not self._queue)
                self._expire()
                self._feed()
                if not self._engine.idle:
                    self._advance()
                self.stepped_at = time.perf_counter()
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
            if job is None or job not in self._jobs:
                continue
            if kind == "submit" and not job.future.cancelled():
                self._queue.push(job)
            else:
                self.counts["aborted"] += 1
                self._abort(job)

    def _expire(self) -> None:
        now = time.perf_counter()
        for job in list(self._jobs):
            if job.deadline is not None and now > job.deadline and not job.denoised:
                self._abort(job)
                self._fail(job, DeadlineError("the deadline passed before the images were ready"))
            elif job.start_by is not None and now > job.start_by and not job.tickets:
                self._abort(job)
                self._fail(job, late(job.forecast.rows, self._load(job.client), max_queue_s=self.max_queue_s))

    def _feed(self) -> None:
        """Hand samples to the engine as far as rows are free; what waits, waits here, where it is fair."""
        while (job := self._queue.head()) is not None:
            if not self._engine.idle and job.forecast.peak_rows > self._engine.free_rows:
                return
            index = len(job.tickets)
            try:
                ticket = self._engine.submit(job.samples[index])
            except Exception as error:
                self._abort(job)
                self._fail(job, error)
                continue
            job.tickets[ticket] = index
            self._owner[ticket] = job
            self._queue.charge(job, job.rows_per_sample)
            if len(job.tickets) == len(job.samples):
                self._queue.remove(job)

    def _abort(self, job: Job) -> None:
        self._queue.remove(job)
        for ticket in job.tickets:
            if self._owner.pop(ticket, None) is not None:
                self._engine.abort(ticket)
        self._forget(job)

    def _advance(self) -> None:
        began = time.perf_counter()
        occupancy = 1.0 - self._engine.free_rows / self._max_rows
        try:
            finished = self._engine.step()
        except Exception as error:
            log.exception("a denoising step failed")
            self.fault = f"the last denoising step failed: {type(error).__name__}"
            for job in set(self._owner.values()):
                self._abort(job)
                self._fail(job, EngineFaultError("the engine failed on this batch"))
            return
        self._account(began, occupancy, finished)
        failed = [output.error for output in finished.values() if _is_fault(output.error)]
        if failed:
            log.error("a denoising step failed", exc_info=failed[0])
        self.fault = f"the last denoising step failed: {type(failed[0]).__name__}" if failed else None
        for ticket, output in finished.items():
            self._deliver(ticket, output)

    def _account(self, began: float, occupancy: float, finished: dict[int, Output]) -> None:
        """After a step: what is left of every group, what its listener should hear, and the row rate."""
        rows = 0.0
        for job in set(self._owner.values()):
            left = job.rows_per_sample * (len(job.samples) - len(job.tickets))
            slowest = 0 if left else job.samples[0].num_inference_steps
            for ticket in job.tickets:
                if ticket in finished or ticket not in self._owner:
                    continue
                step, total = self._engine.progress(ticket)
                left += job.rows_per_sample * (total - step) / total
                slowest = min(slowest, step)
                self._show(job, ticket, step, total)
            if job.started is None:
                job.started = began
            if slowest > job.told:
                job.told = slowest
                job.tell(Progress(slowest, job.samples[0].num_inference_steps))
            rows += job.left - left
            job.left = left
        seconds = max(time.perf_counter() - began, 1e-6)
        self._rate.observe(rows, seconds, weight=min(1.0, occupancy))
        self._metrics.step(seconds=seconds, rows=rows, occupancy=occupancy, backlog_s=self.backlog_s)

    def _show(self, job: Job, ticket: int, step: int, total: int) -> None:
        index = job.preview_at(step, total)
        if index is None:
            return
        try:
            image = self._engine.preview(ticket)
        except Exception:
            # the image itself may still be had
            log.exception("a preview failed")
            return
        if image is not None:
            self._decoder.submit(self._tell_preview, job, (job.tickets[ticket], index, step, total), image)

    def _tell_preview(self, job: Job, where: tuple[int, int, int, int], image: Tensor) -> None:
        job.tell(Preview(*where, pixels=to_uint8(image[None].float().cpu().numpy())[0]))

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
        if job.denoised:
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
                self.counts["finished"] += not job.probe
                job.future.set_result(finished)
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
            self.counts["failed"] += 1
            job.future.set_exception(error)


def _is_fault(error: Exception | None) -> bool:
    """Whether an output's error is the engine's own; a sample that diverged was asked for."""
    return error is not None and not isinstance(error, DenoisingError)
