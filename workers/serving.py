"""The endpoint on Ray Serve: an ingress without torch before replicas that each own one engine.

    client -> proxy -> Ingress (workers.routes) -> Engine (workers.bundle_host, one engine thread)

Only requests, answers, events and refusals cross between the two. Annotations stay real objects in this module:
Serve reads the type of `build_app`'s argument to parse `args` of a configuration file.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from workers.api import Caller, GenerationRequest, GenerationResponse, Health, Refusal
from workers.autoscaling import BACKLOG, autoscaling
from workers.deploying import ENGINE
from workers.engine_args import ServeArgs
from workers.events import Event
from workers.handle_backend import HandleBackend
from workers.latest_evaluation import LatestEvaluation
from workers.logs import log_as_json
from workers.model_card import ModelCard
from workers.routes import create_http
from workers.tokens import Tokens

# Serve's own bound of 5 would starve the batch; admission by forecast seconds is the bound that counts.
MAX_ONGOING_REQUESTS = 2_000
# Longer than a full queue takes.
DRAIN_S = 60


@serve.deployment(
    name=ENGINE,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=5,
    health_check_timeout_s=30,
    max_constructor_retry_count=2,
    graceful_shutdown_timeout_s=DRAIN_S,
)
class EngineReplica:
    """Serves one bundle at a time; unhealthy once its engine does not get on."""

    def __init__(self, args: ServeArgs) -> None:
        # The ingress imports this module too and must stay free of torch.
        import torch

        from workers.bundle_host import BundleHost
        from workers.ray_metrics import RayMetrics

        log_as_json()
        torch.set_num_threads(args.num_threads)
        self._args = args
        self._host = BundleHost(args, RayMetrics())
        self._following: asyncio.Task[None] | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve the bundle that `config` names; the first one before anything else, any later one when it is loaded."""
        bundle = config.get("bundle")
        if self._following is None:
            await asyncio.to_thread(self._host.start, bundle)
            self._following = asyncio.create_task(self._host.follow())
        else:
            self._host.want(bundle)

    async def card(self) -> ModelCard:
        return await self._host.service.card()

    async def evaluation(self) -> LatestEvaluation | Refusal:
        return await self._host.service.evaluation()

    async def generate(self, request: GenerationRequest, caller: Caller) -> GenerationResponse | Refusal:
        return await self._host.service.generate(request, caller)

    async def stream(self, request: GenerationRequest, caller: Caller) -> AsyncIterator[Event | Refusal]:
        async with contextlib.aclosing(self._host.service.stream(request, caller)) as events:
            async for event in events:
                yield event

    async def readiness(self) -> Health | Refusal:
        return await self._host.readiness()

    async def resolve(self, bundle: str) -> str | Refusal:
        """The bundle with its version written out, fetched and checked; a Refusal says what is wrong with it."""
        return await asyncio.to_thread(self._host.resolve, bundle)

    async def standing(self, bundle: str, ref: str) -> Health | Refusal:
        """Whether this replica serves `bundle` by now, in the version `ref`; a Refusal when it could not be loaded."""
        return self._host.standing(bundle, ref)

    async def figures(self) -> dict[str, Any]:
        """Requests in flight, and answered, aborted and failed so far, with the replica's process id."""
        loop = self._host.service.loop
        return {"pid": os.getpid(), "in_flight": loop.in_flight, "rows_per_s": loop.rows_per_s, **loop.counts}

    async def check_health(self) -> None:
        if self._following is not None:
            await self._host.service.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {BACKLOG: self._host.service.loop.backlog_s if self._following is not None else 0.0}


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=DRAIN_S,
)
@serve.ingress()
class Ingress:
    """Speaks HTTP; holds no model."""

    def __init__(self, engine: DeploymentHandle, args: ServeArgs) -> None:
        log_as_json()
        self._backend = HandleBackend(engine)
        self._args = args

    def __serve_build_asgi_app__(self) -> FastAPI:
        from workers.ray_metrics import RayMetrics

        return create_http(
            self._backend,
            tokens=Tokens(Path(self._args.tokens)) if self._args.tokens else None,
            metrics=RayMetrics(),
            max_concurrent=self._args.max_concurrent,
            # Serve's proxy sends it back itself
            echo_ids=False,
        )


def build_app(args: ServeArgs) -> serve.Application:
    """The Serve application for `args`; also the `import_path` of infra/serve.yaml."""
    wants_gpu = args.device.startswith("cuda") or (args.device == "auto" and _cluster_has_gpu())
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": args.num_threads, "num_gpus": 1 if wants_gpu else 0},
        "user_config": {"bundle": args.bundle_ref},
    }
    if args.max_replicas is not None and args.max_replicas > args.num_replicas:
        options["autoscaling_config"] = autoscaling(args.num_replicas, args.max_replicas, args.target_backlog_s)
    else:
        options["num_replicas"] = args.num_replicas
    return Ingress.bind(EngineReplica.options(**options).bind(args), args)


def _cluster_has_gpu() -> bool:
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
