"""Brings the endpoint up on the Ray cluster in use, changes its bundle, and takes it down.

The application is deployed from a Serve configuration, the same as `serve deploy infra/serve.yaml` makes: so the
controller knows which bundle is wanted, hands it to replicas that run (which load it without losing a request) and to
those that it starts later.
"""

import contextlib
import logging
import socket
import time
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from workers.api import Health, Refusal, unavailable
from workers.engine_args import ServeArgs
from workers.model_card import ModelCard
from workers.tokens import Tokens

APP_NAME = "diffusion-blend"
ENGINE = "Engine"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEPLOY_TIMEOUT_S = 600.0
POLL_S = 0.1
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


class ServingError(RuntimeError):
    """The endpoint could not be brought up; the message says why and what to do."""


def deploy(args: ServeArgs, *, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> str:
    """Bring the endpoint up, or change it to `args`, on the Ray cluster in use; return its URL once it is ready.

    Serve has one HTTP proxy per cluster: when it already runs, its own host and port stay and are returned.
    The bundle is fetched and checked here first, so that a wrong one never touches what runs: its errors are those
    of `workers.loading.pin`, and TokenFileError for a token file. ServingError when the application does not come up.
    """
    from workers.loading import pin

    ref = pin(args).bundle
    if args.tokens:
        Tokens(Path(args.tokens))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options={"host": host, "port": port},
        logging_config=LOGGING,
    )
    try:
        _apply(_application(args))
        _wait_until_running()
        if args.bundle_ref is not None:
            outcome = wait_until_served(args.bundle_ref, str(ref))
            if isinstance(outcome, Refusal):
                raise ServingError(outcome.message)
    except RayError as error:
        raise ServingError(f"the endpoint did not come up: {error}") from error
    return address()


def served_card() -> ModelCard:
    """What is served, asked past the HTTP face and its tokens."""
    return cast(ModelCard, serve.get_deployment_handle(ENGINE, APP_NAME).card.remote().result())


def undeploy() -> None:
    """Take the endpoint down once its requests are answered; Serve itself ends with its Ray cluster."""
    serve.delete(APP_NAME)


def change_bundle(bundle: str) -> None:
    """Tell the controller which bundle is wanted; replicas load it while they go on serving the old one."""
    application = _deployed().get(APP_NAME)
    if application is None:
        raise ServingError(
            "this endpoint was not deployed from a configuration: deploy it with `diffusion-blend deploy`"
        )
    engine = next((one for one in application.setdefault("deployments", []) if one["name"] == ENGINE), None)
    if engine is None:
        application["deployments"].append(engine := {"name": ENGINE})
    engine["user_config"] = {"bundle": bundle}
    _apply(application)


def wait_until_served(bundle: str, ref: str) -> Health | Refusal:
    """Return when every replica serves `bundle` in the version `ref`; a Refusal when one could not load it."""
    engine = serve.get_deployment_handle(ENGINE, APP_NAME)
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while time.monotonic() < deadline:
        told: list[Health | Refusal] = []
        # while a replica takes its new configuration over, there is none to broadcast to
        with contextlib.suppress(RayServeException):
            told = engine.broadcast("standing", bundle, ref).results()
        refused = [one for one in told if isinstance(one, Refusal)]
        if refused:
            return refused[0]
        if told and all(isinstance(one, Health) and one.status == "ready" for one in told):
            return told[0]
        time.sleep(POLL_S)
    message = f"{bundle} is still being loaded after {DEPLOY_TIMEOUT_S:g} s; see /readyz"
    return unavailable(message, retry_after_s=30)


def address() -> str:
    """URL of the HTTP proxy of the Serve instance in use."""
    options = _client().http_config
    host = DEFAULT_HOST if options.host in ("0.0.0.0", "::", None) else options.host
    return f"http://{host}:{options.port}"


def check_port(host: str, port: int, option: str = "--port") -> int:
    """`port` if it can be listened on (0: a free one); ServingError otherwise."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ServingError(f"cannot listen on {host}:{port}: {reason}; choose another {option}") from None
        return int(probe.getsockname()[1])


def _application(args: ServeArgs) -> dict[str, Any]:
    """The configuration of the application; what changes without a restart is in `user_config` alone."""
    fixed = args.model_copy(update={"bundle": None if args.adapters else ServeArgs().bundle_ref})
    return {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": "workers.serving:build_app",
        "args": fixed.model_dump(mode="json", exclude_defaults=True),
        "deployments": [{"name": ENGINE, "user_config": {"bundle": args.bundle_ref}}],
        "logging_config": LOGGING,
    }


def _apply(application: dict[str, Any]) -> None:
    # an application that a configuration leaves out is taken down: the others stay as they are
    others = [config for name, config in _deployed().items() if name != APP_NAME]
    _client().deploy_apps(ServeDeploySchema.model_validate({"applications": [*others, application]}))


def _deployed() -> dict[str, dict[str, Any]]:
    """Configurations of the applications that were deployed from one, by name."""
    applications = _client().get_serve_details()["applications"]
    return {name: dict(app["deployed_app_config"]) for name, app in applications.items() if app["deployed_app_config"]}


def _wait_until_running() -> None:
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while time.monotonic() < deadline:
        status = serve.status().applications.get(APP_NAME)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            lines = status.message.splitlines()
            lines += [line for one in status.deployments.values() for line in one.message.splitlines()]
            told = [line.strip() for line in lines if line.strip()]
            raise ServingError(f"the endpoint did not come up: {told[-1] if told else status.status}")
        time.sleep(POLL_S)
    raise ServingError(f"the endpoint did not come up within {DEPLOY_TIMEOUT_S:g} s; see `serve status`")


def _client() -> Any:
    # Serve has no public way to ask where its proxy listens, or to apply a configuration from Python
    from ray.serve.context import _get_global_client

    return _get_global_client()
