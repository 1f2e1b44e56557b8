"""The endpoint on Ray Serve: an ingress without torch before replicas that each own one engine.

    client -> proxy -> Ingress (workers.routes) -> Engine (workers.service, one engine thread)

Only requests, answers and refusals cross between the two. Annotations stay real objects in this module:
Serve reads the type of `build_app`'s argument to parse `args` of a configuration file.
"""

import asyncio
import logging
import os
import socket
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from workers.api import GenerationRequest, GenerationResponse, Health, Refusal
from workers.engine_args import ServeArgs
from workers.model_card import ModelCard
from workers.routes import create_http, unavailable

log = logging.getLogger(__name__)

APP_NAME = "diffusion-blend"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
# Serve's own bound of 5 would starve the batch; admission by rows in the replica is the bound that counts.
MAX_ONGOING_REQUESTS = 1_000
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


class ServingError(RuntimeError):
    """The endpoint could not be brought up; the message says why and what to do."""


@serve.deployment(
    name="Engine",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=5,
    health_check_timeout_s=30,
    max_constructor_retry_count=2,
    graceful_shutdown_timeout_s=20,
)
class EngineReplica:
    """Loads one bundle and answers from it; unhealthy once its engine thread has ended."""

    def __init__(self, args: ServeArgs) -> None:
        # The ingress imports this module too and must stay free of torch.
        import torch

        from workers.loading import open_engine
        from workers.service import GenerationService

        torch.set_num_threads(args.num_threads)
        self.service = GenerationService(open_engine(args), max_queued_rows=args.max_queued_rows)
        self.service.warm_up()

    async def card(self) -> ModelCard:
        return await self.service.card()

    async def generate(self, request: GenerationRequest) -> GenerationResponse | Refusal:
        return await self.service.generate(request)

    async def readiness(self) -> Health | Refusal:
        return await self.service.readiness()

    async def figures(self) -> dict[str, int]:
        """Requests in flight, and answered, aborted and failed so far, with the replica's process id."""
        loop = self.service.loop
        return {"pid": os.getpid(), "in_flight": loop.in_flight, **loop.counts}

    def check_health(self) -> None:
        if not self.service.loop.alive:
            raise ServingError(self.service.loop.fault or "the engine thread has ended")


class HandleBackend:
    """`workers.routes.Backend` over a deployment handle: trouble between the processes becomes a 503."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine

    async def card(self) -> ModelCard | Refusal:
        return await self._ask("card")

    async def generate(self, request: GenerationRequest) -> GenerationResponse | Refusal:
        return await self._ask("generate", request)

    async def readiness(self) -> Health | Refusal:
        return await self._ask("readiness")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        response = getattr(self._engine, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            # Awaiting was given up here; the replica must give up as well.
            response.cancel()
            raise
        except RayActorError:
            return unavailable("the engine replica was lost while it worked on this request; send it again")
        except (BackPressureError, RayServeException) as error:
            log.warning("no engine replica took the request: %s", error)
            return unavailable("no engine replica can take requests right now")


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=20,
)
@serve.ingress()
class Ingress:
    """Speaks HTTP; holds no model."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._backend = HandleBackend(engine)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http(self._backend)


def build_app(args: ServeArgs) -> serve.Application:
    """The Serve application for `args`; also the `import_path` of infra/serve.yaml."""
    wants_gpu = args.device.startswith("cuda") or (args.device == "auto" and _cluster_has_gpu())
    resources = {"num_cpus": args.num_threads, "num_gpus": 1 if wants_gpu else 0}
    engine = EngineReplica.options(num_replicas=args.num_replicas, ray_actor_options=resources)
    return Ingress.bind(engine.bind(args))


def deploy(args: ServeArgs, *, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> str:
    """Bring the endpoint up, or replace it, on the Ray cluster in use; return its URL once it is ready.

    Serve has one HTTP proxy per cluster: when it already runs, its own host and port stay and are returned.
    The bundle is fetched and checked here first, so that a wrong one never touches what runs: its errors are those
    of `workers.loading.pin`. ServingError when the application does not come up.
    """
    from workers.loading import pin

    args = ServeArgs.model_validate(pin(args).model_dump())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config=LOGGING,
    )
    try:
        serve.run(build_app(args), name=APP_NAME, route_prefix="/", logging_config=LOGGING)
    except (RuntimeError, RayError) as error:
        raise ServingError(f"the endpoint did not come up: {_reason(error)}") from error
    return address()


def undeploy() -> None:
    """Take the endpoint down once its requests are answered; Serve itself ends with its Ray cluster."""
    serve.delete(APP_NAME)


def address() -> str:
    """URL of the HTTP proxy of the Serve instance in use."""
    # Serve has no public way to ask where its proxy listens.
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    host = DEFAULT_HOST if options.host in ("0.0.0.0", "::", None) else options.host
    return f"http://{host}:{options.port}"


def check_port(host: str, port: int) -> int:
    """`port` if it can be listened on (0: a free one); ServingError otherwise."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ServingError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None
        return int(probe.getsockname()[1])


def _cluster_has_gpu() -> bool:
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0


def _reason(error: BaseException) -> str:
    """The last line of what Serve collected from the replica that failed; the rest is in Ray's logs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    status = serve.status().applications.get(APP_NAME)
    for deployment in status.deployments.values() if status else ():
        lines += [line.strip() for line in deployment.message.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
