"""The endpoint with two other ways to run the same engine: one request at a time, and whole batches of requests.

Imported by replicas of Ray Serve.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from ray import serve

from workers.api import Caller, GenerationRequest, GenerationResponse, Refusal
from workers.engine_args import ServeArgs
from workers.serving import MAX_ONGOING_REQUESTS, EngineReplica, Ingress

if TYPE_CHECKING:
    from workers.service import GenerationService

BATCH = 8
BATCH_WAIT_S = 0.02


class OneAtATime(EngineReplica.func_or_class):
    """The next request waits until the last one is answered."""

    def __init__(self, args: ServeArgs) -> None:
        super().__init__(args)
        self._turn = asyncio.Lock()

    async def generate(self, request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal:
        async with self._turn:
            return await super().generate(request, caller)


class WholeBatches(EngineReplica.func_or_class):
    """`@serve.batch`: a batch is answered when its longest request has ended, and no other joins it.

    Rows of requests that have ended leave the forwards, which is kinder than a batch of one shape can be.
    """

    padded = False

    async def generate(self, request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal:
        return await self._together(request, caller)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _together(
        self, requests: list[GenerationRequest], callers: list[Caller]
    ) -> list[GenerationResponse | Refusal]:
        longest = max(_steps(self._host.service, request) for request in requests)

        async def answer(request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal:
            answer = await self._host.service.generate(request, caller)
            left = longest - _steps(self._host.service, request)
            if self.padded and left:
                await _run_on(self._host.service, request, left)
            return answer

        return await asyncio.gather(*map(answer, requests, callers))


class PaddedBatches(WholeBatches):
    """The same with tensors of one shape until the batch ends, as a batch through one pipeline call has them."""

    padded = True


def _steps(service: "GenerationService", request: GenerationRequest) -> int:
    return request.num_inference_steps or service.opened.card.defaults.num_inference_steps


async def _run_on(service: "GenerationService", request: GenerationRequest, steps: int) -> None:
    """Keep the rows of a request in the batch for so many steps; nothing is decoded."""
    # its module loads torch, which the ingress must not
    from workers.generation import forecast, plan

    here, done = asyncio.get_running_loop(), asyncio.Event()

    def end(what: object) -> None:
        if getattr(what, "step", steps) >= steps:
            here.call_soon_threadsafe(done.set)

    # one step longer, so that it is there to be taken out when it has run them
    samples = plan(request.model_copy(update={"num_inference_steps": steps + 1}), service.opened)
    job = service.loop.enter(samples, forecast(samples, service.opened.basis), admitted=True, listener=end)
    job.future.add_done_callback(end)
    await done.wait()
    service.loop.leave(job)


def build_rival(replica: type, args: ServeArgs) -> serve.Application:
    """The same ingress and options as `workers.serving.build_app`, over another replica."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": args.num_threads, "num_gpus": 0},
        "user_config": {"bundle": args.bundle_ref},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
    }
    return Ingress.bind(serve.deployment(replica, name="Engine", **options).bind(args), args)
