"""One loaded bundle answering requests: the backend behind the routes, in a replica or in one process."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Callable

from blend.engine import DenoisingError, Sample, SampleError
from blend.preference import Preference
from workers.api import (
    ANYONE,
    Caller,
    GenerationRequest,
    GenerationResponse,
    Health,
    ImageData,
    Refusal,
    RequestError,
    Usage,
    unavailable,
)
from workers.engine_loop import EngineLoop
from workers.events import Event, PartialImageEvent, ProgressEvent, completed_events
from workers.generation import Opened, facts_of, forecast, plan
from workers.images import encode_png
from workers.jobs import DeadlineError, EngineFaultError, Finished, Job, Preview, Progress, QueueFullError
from workers.latest_evaluation import LatestEvaluation, latest_evaluation
from workers.metrics import Metrics
from workers.model_card import ModelCard

log = logging.getLogger(__name__)

WARM_UP_TIMEOUT_S = 300.0
# A busy engine that has not ended a step for so long is stuck.
STALL_S = 120.0


class GenerationService:
    """Implements `workers.routes.Backend` over an engine of its own. Call `close` at the end."""

    def __init__(self, opened: Opened, *, max_queue_s: float, metrics: Metrics | None = None) -> None:
        self.opened = opened
        self.metrics = metrics or Metrics()
        self.loop = EngineLoop(opened.engine, max_queue_s=max_queue_s, metrics=self.metrics)

    def warm_up(self) -> None:
        """Load everything a first request would, and measure the row rate: a few forwards and one decode.

        Raises what goes wrong.
        """
        samples = [self._probe(seed, steps=2) for seed in range(min(8, self.opened.engine.free_rows))]
        for _ in range(2):
            job = self.loop.enter(samples, forecast(samples, self.opened.basis))
            job.future.result(timeout=WARM_UP_TIMEOUT_S)

    def close(self) -> None:
        self.loop.close()

    async def card(self) -> ModelCard:
        return self.opened.card

    async def evaluation(self) -> LatestEvaluation | Refusal:
        return await asyncio.to_thread(latest_evaluation, self.opened.args, self.opened.card)

    async def switch(self, bundle: str) -> Health | Refusal:
        return Refusal(status=409, message="this process serves the one bundle it was started with")

    async def generate(self, request: GenerationRequest, caller: Caller = ANYONE) -> GenerationResponse | Refusal:
        """Images for `request`, or why not. Cancelling the awaiting task frees its rows within a step."""
        try:
            job = self._enter(request, caller)
            finished = await self.loop.finish(job)
        except Exception as error:
            return _refused(error, caller)
        except asyncio.CancelledError:
            _note("given_up", caller)
            raise
        return await asyncio.to_thread(self._respond, job, finished, caller)

    async def stream(self, request: GenerationRequest, caller: Caller = ANYONE) -> AsyncIterator[Event | Refusal]:
        """The same, told on the way; a Refusal ends it. Closing the iterator frees the rows within a step."""
        events: asyncio.Queue[Progress | Preview | None] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def listen(what: Progress | Preview) -> None:
            here.call_soon_threadsafe(events.put_nowait, what)

        try:
            job = self._enter(request, caller, listen)
        except Exception as error:
            yield _refused(error, caller)
            return
        ended = asyncio.wrap_future(job.future)
        ended.add_done_callback(lambda _: events.put_nowait(None))
        try:
            yield ProgressEvent(step=0, total=job.samples[0].num_inference_steps)
            while (what := await events.get()) is not None:
                if isinstance(what, Progress):
                    yield ProgressEvent(step=what.step, total=what.total)
                else:
                    yield await asyncio.to_thread(self._partial, job, what)
            answer = await asyncio.to_thread(self._respond, job, ended.result(), caller)
            for event in completed_events(answer, self._size(job.samples[0])):
                yield event
        except Exception as error:
            yield _refused(error, caller)
        finally:
            if not ended.done():
                _note("given_up", caller)
                ended.cancel()
                self.loop.leave(job)

    async def readiness(self) -> Health | Refusal:
        """Ready while the last forward went well; after a fault one probing forward decides."""
        fault = self.loop.fault
        if not self.loop.alive:
            return unavailable(fault or "the engine thread has ended")
        if fault is not None:
            try:
                await self._try_forward()
            except EngineFaultError:
                return unavailable(self.loop.fault or fault)
        return Health(status="ready", bundle=self.opened.card.bundle)

    async def check(self) -> None:
        """Run one row through the engine when it is idle, or see that it gets on. EngineFaultError otherwise."""
        if not self.loop.alive:
            raise EngineFaultError(self.loop.fault or "the engine thread has ended")
        if self.loop.in_flight == 0:
            await self._try_forward()
        elif time.perf_counter() - self.loop.stepped_at > STALL_S:
            raise EngineFaultError(f"the engine has not ended a step for {STALL_S:g} s")

    async def _try_forward(self) -> None:
        samples = [self._probe(0, steps=1)]
        await self.loop.finish(self.loop.enter(samples, forecast(samples, self.opened.basis), probe=True))

    def _enter(
        self, request: GenerationRequest, caller: Caller, listener: Callable[[Progress | Preview], None] | None = None
    ) -> Job:
        samples = plan(request, self.opened)
        work, backlog_s = forecast(samples, self.opened.basis), self.loop.backlog_s
        job = self.loop.enter(
            samples,
            work,
            client=caller.client,
            deadline_s=caller.deadline_s,
            admitted=caller.admitted,
            listener=listener,
            previews=request.partial_images,
        )
        _note("taken_in", caller, images=len(samples), rows=work.rows, backlog_s=round(backlog_s, 3))
        return job

    def _probe(self, seed: int, *, steps: int) -> Sample:
        weights = {name: 1.0 if index == 0 else 0.0 for index, name in enumerate(self.opened.basis)}
        preference = Preference.parse(weights, 0.0, "mpa", basis=self.opened.basis)
        return Sample(prompt="probe", preference=preference, seed=seed, num_inference_steps=steps, guidance_scale=1.0)

    def _size(self, sample: Sample) -> str:
        facts = facts_of(sample, self.opened.card)
        return f"{facts.width}x{facts.height}"

    def _partial(self, job: Job, what: Preview) -> PartialImageEvent:
        return PartialImageEvent(
            b64_json=_base64(encode_png(what.pixels)),
            image_index=what.image,
            partial_image_index=what.index,
            step=what.step,
            total=what.total,
            created_at=int(time.time()),
            size=self._size(job.samples[what.image]),
        )

    def _respond(self, job: Job, finished: Finished, caller: Caller) -> GenerationResponse:
        card, preference = self.opened.card, job.samples[0].preference
        data = [
            ImageData(b64_json=_base64(encode_png(pixels, facts_of(sample, card))), seed=sample.seed)
            for sample, pixels in zip(job.samples, finished.images, strict=True)
        ]
        usage = Usage(
            rows=finished.rows,
            steps=job.samples[0].num_inference_steps,
            queue_ms=round(finished.queue_ms, 3),
            denoise_ms=round(finished.denoise_ms, 3),
            decode_ms=round(finished.decode_ms, 3),
        )
        self.metrics.answered(method=preference.method, images=len(data), queue_s=finished.queue_ms / 1e3)
        _note("answered", caller, images=len(data), method=preference.method, **usage.model_dump())
        return GenerationResponse(
            created=int(time.time()),
            data=data,
            bundle=card.bundle,
            weights=preference.weights,
            kl_lambda=preference.kl_lambda,
            method=preference.method,
            usage=usage,
        )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _note(event: str, caller: Caller, **facts: object) -> None:
    log.info(event, extra={"facts": {"request_id": caller.request_id, **facts}})


def _refused(error: Exception, caller: Caller) -> Refusal:
    refusal = _refusal_of(error)
    # the message, and what comes after a dot in the field's name, may be the client's own words
    field = (refusal.param or "").partition(".")[0] or None
    _note("refused", caller, status=refusal.status, type=refusal.type, param=field)
    return refusal


def _refusal_of(error: Exception) -> Refusal:
    """What a client is told of `error`; what is no answer is raised again."""
    match error:
        case RequestError():
            return error.refusal
        case QueueFullError():
            return Refusal(status=429, message=str(error), type="rate_limit_error", retry_after_s=error.retry_after_s)
        case DeadlineError():
            return Refusal(status=408, message=f"{error}; allow more time or ask for less", type="timeout_error")
        case EngineFaultError():
            return unavailable(str(error))
        case DenoisingError():
            return Refusal(status=400, message=str(error), param="guidance_scale")
        case SampleError(param="height" | "width"):
            return Refusal(status=400, message=f"size: {error}", param="size")
        case ValueError():
            # The engine's own last look at a sample; a plan should have found all but what the memory holds.
            log.warning("the engine refused a planned sample", exc_info=error)
            return Refusal(status=400, message=str(error))
    raise error
