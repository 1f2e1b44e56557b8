"""The endpoint under test, on a private cluster: brought up by `deploy`, asked over HTTP, watched from outside."""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from workers.client import request_card
from workers.engine_args import ServeArgs
from workers.model_card import ModelCard

CLIENTS = ("ann", "ben", "cleo", "dan")
ADMIN = "operator"
# titles of Ray's processes -> what they are called here
PROCESSES = {f"ServeReplica:{{app}}:{role}": role.lower() for role in ("Engine", "Ingress")} | {"ProxyActor": "proxy"}


@dataclass(frozen=True, slots=True)
class Service:
    """A running endpoint; `tokens` are those of its clients by name, `admin` that of its operator."""

    url: str
    args: ServeArgs
    tokens: dict[str, str]
    admin: str

    def card(self) -> ModelCard:
        return request_card(self.url, next(iter(self.tokens.values())))

    def figures(self) -> dict[str, Any]:
        """The engine replica's own count of requests. Not from an event loop."""
        from ray import serve

        from workers.deploying import APP_NAME, ENGINE

        return serve.get_deployment_handle(ENGINE, APP_NAME).figures.remote().result(timeout_s=60)

    def processes(self) -> dict[str, psutil.Process]:
        """Engine replica, ingress replica and HTTP proxy."""
        from workers.deploying import APP_NAME

        titles = {title.format(app=APP_NAME): name for title, name in PROCESSES.items()}
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            found |= {name: process for title, name in titles.items() if title in line}
        return found


class Stage:
    """One cluster and one port for all services of a run; each replaces the one before."""

    def __init__(self, directory: Path, port: int) -> None:
        self._port = port
        secret = {name: secrets.token_hex(16) for name in (*CLIENTS, ADMIN)}
        scopes = dict.fromkeys(CLIENTS, "images") | {ADMIN: "images,admin"}
        lines = [
            f"{name} {scopes[name]} {hashlib.sha256(token.encode()).hexdigest()}" for name, token in secret.items()
        ]
        self._file = directory / "tokens"
        self._file.write_text("\n".join(lines) + "\n")
        self._admin = secret.pop(ADMIN)
        self._tokens = secret

    def serve(self, **args: Any) -> Service:
        """Bring the endpoint up with these fields of ServeArgs, or change it to them."""
        from workers.deploying import deploy

        wanted = ServeArgs(**{"bundle": "sprites@champion", "device": "cpu", "tokens": str(self._file), **args})
        return Service(deploy(wanted, port=self._port), wanted, self._tokens, self._admin)


@contextmanager
def open_stage(num_cpus: int = 4) -> Iterator[Stage]:
    """A private cluster; num_cpus are the replicas it has room for, however many cores there are."""
    from ray import serve

    from workers.cluster import ray_session
    from workers.deploying import check_port

    # Ray's default of 15 would let everything else on the machine go first, the clients of this process too
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as directory, ray_session(num_cpus=num_cpus, num_gpus=0):
        try:
            yield Stage(Path(directory), check_port("127.0.0.1", 0))
        finally:
            serve.shutdown()
