"""The endpoint with two other ways to run the same engine: one request at a time, and whole batches of requests.

Imported by replicas of Ray Serve.
"""

import asyncio
from typing import Any

from ray import serve

from workers.api import Caller, GenerationRequest, GenerationResponse, Refusal
from workers.engine_args import ServeArgs
from workers.serving import MAX_ONGOING_REQUESTS, EngineReplica, Ingress

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

    async def generate(self, request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal:
        return await self._together(request, caller)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _together(
        self, requests: list[GenerationRequest], callers: list[Caller]
    ) -> list[GenerationResponse | Refusal]:
        service = self._host.service
        return await asyncio.gather(*map(service.generate, requests, callers))


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
