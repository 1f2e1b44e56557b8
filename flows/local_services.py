"""Programs a job needs beside it on one machine, ended by pid: a Prefect server and a process worker."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_SECONDS = 15.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on; the system keeps such ports above 32767."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(path: Path, lines: int = 5) -> str:
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return " | ".join(line.strip() for line in text[-lines:] if line.strip()) or "it is empty"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: its session gets SIGTERM, then SIGKILL after STOP_SECONDS."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=STOP_SECONDS)
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def program(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    ready: Callable[[], bool],
    timeout: float = 120.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a session of its own until the block ends; yield once ready() holds.

    Raises RuntimeError naming the log when it ends early or is not ready within `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout
        while not ready():
            if process.poll() is not None:
                raise RuntimeError(f"{command[2]} ended early ({process.returncode}); {log}: {log_tail(log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{command[2]} not ready in {timeout:.0f} s; {log}: {log_tail(log)}")
            time.sleep(0.2)
        yield process
    finally:
        stop(process)


def prefect_environment(home: Path, api_url: str) -> dict[str, str]:
    """Variables with which a process and its children use one Prefect server and nothing of the user's."""
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }


@contextmanager
def prefect_server(home: Path) -> Iterator[dict[str, str]]:
    """A Prefect server with its database and log under `home`; yields the environment that leads to it."""
    import httpx

    port = free_port()
    environment = prefect_environment(home, f"http://127.0.0.1:{port}/api")

    def healthy() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with program(command, log=home / "server.log", environment=environment, ready=healthy):
        yield environment


@contextmanager
def prefect_worker(pool: str, home: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A process worker of a work pool; flow runs it starts see `environment`."""
    log = home / f"worker-{pool}.log"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]

    def polling() -> bool:
        return "started" in log.read_text(errors="replace")

    with program(command, log=log, environment=environment, ready=polling):
        yield
