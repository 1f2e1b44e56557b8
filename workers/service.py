"""One loaded bundle answering requests: the backend behind the routes, in a replica or in one process."""

import asyncio
import base64
import logging
import time
from typing import Literal

from blend.engine import DenoisingError, Sample, SampleError
from blend.preference import Preference
from workers.api import GenerationRequest, GenerationResponse, Health, ImageData, Refusal, RequestError, Usage
from workers.engine_loop import EngineFaultError, EngineLoop, Finished, QueueFullError
from workers.generation import Opened, facts_of, forecast_rows, plan
from workers.images import encode_png
from workers.model_card import ModelCard

log = logging.getLogger(__name__)

WARM_UP_TIMEOUT_S = 300.0
Kind = Literal["server_error", "unavailable_error"]


class GenerationService:
    """Implements `workers.routes.Backend` over an engine of its own. Call `close` at the end."""

    def __init__(self, opened: Opened, *, max_queued_rows: int) -> None:
        self.opened = opened
        self.loop = EngineLoop(opened.engine, max_queued_rows=max_queued_rows)

    def warm_up(self) -> None:
        """Load everything a first request would: one base forward and one decode. Raises what goes wrong."""
        job = self.loop.enter([self._probe()], 1)
        job.future.result(timeout=WARM_UP_TIMEOUT_S)

    def close(self) -> None:
        self.loop.close()

    async def card(self) -> ModelCard:
        return self.opened.card

    async def generate(self, request: GenerationRequest) -> GenerationResponse | Refusal:
        """Images for `request`, or why not. Cancelling the awaiting task frees its rows within a step."""
        try:
            samples = plan(request, self.opened)
            rows = sum(forecast_rows(sample, self.opened.basis) for sample in samples)
            finished = await self.loop.generate(samples, rows)
        except RequestError as error:
            return error.refusal
        except QueueFullError as error:
            return Refusal(status=429, message=str(error), type="rate_limit_error", retry_after_s=error.retry_after_s)
        except EngineFaultError as error:
            return _failure(503, "unavailable_error", str(error))
        except DenoisingError as error:
            return Refusal(status=400, message=str(error), param="guidance_scale")
        except ValueError as error:
            if isinstance(error, SampleError) and error.param in ("height", "width"):
                return Refusal(status=400, message=f"size: {error}", param="size")
            # The engine's own last look at a sample; a plan should have found all but what the memory holds.
            log.warning("the engine refused a planned sample", exc_info=error)
            return Refusal(status=400, message=str(error))
        return await asyncio.to_thread(self._respond, samples, finished)

    async def readiness(self) -> Health | Refusal:
        """Ready while the last forward went well; after a fault one probing forward decides."""
        fault = self.loop.fault
        if not self.loop.alive:
            return _failure(503, "unavailable_error", fault or "the engine thread has ended")
        if fault is not None:
            try:
                await self.loop.generate([self._probe()], 1)
            except (EngineFaultError, QueueFullError):
                return _failure(503, "unavailable_error", self.loop.fault or fault)
        return Health(status="ready", bundle=self.opened.card.bundle)

    def _probe(self) -> Sample:
        weights = {name: 1.0 if index == 0 else 0.0 for index, name in enumerate(self.opened.basis)}
        preference = Preference.parse(weights, 0.0, "mpa", basis=self.opened.basis)
        return Sample(prompt="probe", preference=preference, seed=0, num_inference_steps=1, guidance_scale=1.0)

    def _respond(self, samples: list[Sample], finished: Finished) -> GenerationResponse:
        card = self.opened.card
        data = [
            ImageData(
                b64_json=base64.b64encode(encode_png(pixels, facts_of(sample, card))).decode(),
                seed=sample.seed,
            )
            for sample, pixels in zip(samples, finished.images, strict=True)
        ]
        preference = samples[0].preference
        return GenerationResponse(
            created=int(time.time()),
            data=data,
            bundle=card.bundle,
            weights=preference.weights,
            kl_lambda=preference.kl_lambda,
            method=preference.method,
            usage=Usage(
                rows=finished.rows,
                steps=samples[0].num_inference_steps,
                queue_ms=round(finished.queue_ms, 3),
                denoise_ms=round(finished.denoise_ms, 3),
                decode_ms=round(finished.decode_ms, 3),
            ),
        )


def _failure(status: int, kind: Kind, message: str) -> Refusal:
    return Refusal(status=status, message=message, type=kind, retry_after_s=5)
