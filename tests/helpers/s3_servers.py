"""Fixtures: a real server that speaks S3, one for the session and as many as a test wants to end."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class S3Server:
    """A running S3-protocol server with an empty bucket, a key that may do all and one that may only read."""

    endpoint_url: str
    bucket: str = "blend-test"
    key: str = "writer"
    secret: str = "writer-secret"
    reader_key: str = "reader"
    reader_secret: str = "reader-secret"

    def env(self, prefix: str) -> dict[str, str]:
        """Environment that makes s3://bucket/prefix the store of this or another process."""
        return {
            "DIFFUSION_BLEND_STORE_URL": f"s3://{self.bucket}/{prefix}",
            "DIFFUSION_BLEND_S3_ENDPOINT_URL": self.endpoint_url,
            "DIFFUSION_BLEND_S3_KEY": self.key,
            "DIFFUSION_BLEND_S3_SECRET": self.secret,
        }


@dataclass
class S3Process:
    """A server of one's own, that may be ended and started again where it was, with what it holds."""

    directory: Path
    ports: list[int]
    process: subprocess.Popen[bytes]

    @property
    def facts(self) -> S3Server:
        return S3Server(endpoint_url=f"http://127.0.0.1:{self.ports[0]}")

    def start(self) -> None:
        self.process = _start_weed(self.directory, self.ports)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        # What it holds is thrown away, and its farewell can take ten seconds.
        self.kill()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on free ports of 127.0.0.1; the session fails when it does not start."""
    server = open_s3(lambda: tmp_path_factory.mktemp("weed"))
    yield server.facts
    server.close()


@pytest.fixture
def start_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], S3Process]]:
    """Factory of servers that the test may end."""
    servers: list[S3Process] = []

    def start() -> S3Process:
        servers.append(open_s3(lambda: tmp_path_factory.mktemp("weed")))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def open_s3(new_directory: Callable[[], Path]) -> S3Process:
    """Start a server and wait for its first write; what it keeps lies in a new directory."""
    logs = []
    for _ in range(3):
        directory, ports = new_directory(), _free_port_pairs(5)
        server = S3Process(directory, ports, _start_weed(directory, ports))
        if _first_write_succeeds(server.facts, server.process):
            return server
        server.close()
        logs.append((directory / "log").read_text()[-2000:])
    pytest.fail("SeaweedFS did not start three times over; its logs end:\n" + "\n---\n".join(logs))


def _start_weed(directory: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    server = S3Server(endpoint_url="")
    identities = [
        {
            "name": key,
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": actions,
        }
        for key, secret, actions in (
            (server.key, server.secret, ["Admin", "Read", "Write", "List", "Tagging"]),
            (server.reader_key, server.reader_secret, ["Read", "List"]),
        )
    ]
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    (directory / "data").mkdir(exist_ok=True)
    names = ("s3", "master", "volume", "filer", "admin")
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            [
                str(Path(sys.executable).with_name("weed")),
                "mini",
                f"-dir={directory / 'data'}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-master.telemetry=false",
                f"-s3.config={config}",
                "-admin.ui=false",
                "-webdav=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                *(f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
        )


def _first_write_succeeds(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    from infra.errors import StoreError
    from infra.settings import Settings
    from infra.storage import open_store

    settings = Settings(s3_endpoint_url=server.endpoint_url, s3_key=server.key, s3_secret=server.secret)
    store = open_store(f"s3://{server.bucket}/warm-up", settings)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            store.create("object", b"first")
            return True
        except StoreError:
            time.sleep(0.2)
    return False


def _free_port_pairs(count: int) -> list[int]:
    """Ports p with p + 10000 free too, where SeaweedFS puts its gRPC; clear of those that Ray's workers use."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 45_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found
