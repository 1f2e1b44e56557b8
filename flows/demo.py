"""The demonstration: services, the full-pipeline flow and its summary on one machine, with nothing left running."""

import json
import os
import re
import signal
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flows.local_services import free_port, prefect_server

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

RUN_FILE = Path(__file__).parent.parent / "infra" / "runs" / "demo.toml"
CPUS = 2
POLL_SECONDS = 1.0


def run_demo(run: Path, output_dir: Path, store_url: str | None, stay: bool, console: Console) -> dict[str, Any]:
    """Run the whole job and return its facts, after everything it started has ended.

    run: TOML file with parameters of the full-pipeline flow. stay: keep the endpoint up until Ctrl-C. Every demo gets
    a directory of its own below output_dir; store_url defaults to a directory inside it. Raises RuntimeError that
    says where the logs are; KeyboardInterrupt leaves threads of the flow behind, so end the process after it.
    """
    parameters = tomllib.loads(run.read_text())
    directory = (output_dir / datetime.now().strftime("%Y%m%d-%H%M%S")).absolute()
    directory.mkdir(parents=True)
    began = time.monotonic()
    console.print(f"Everything this demo writes goes to {directory}", soft_wrap=True)
    interrupt_on_signals()
    with services(directory, store_url, console) as places:
        with console.status("Loading the flow"):
            from flows.full_pipeline import full_pipeline
        result = run_pipeline(full_pipeline, parameters | places | {"output_dir": str(directory)}, directory)
        summary = result | {"seconds": round(time.monotonic() - began, 1), "output_dir": str(directory)}
        (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        show_summary(summary, console)
        if stay:
            wait_for_interrupt(console)
    console.print("Everything the demo started has ended.")
    return summary


def interrupt_on_signals() -> None:
    """A polite kill or a closed terminal cleans up as Ctrl-C does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@contextmanager
def services(directory: Path, store_url: str | None, console: Console) -> Iterator[dict[str, Any]]:
    """Storage, Ray and a Prefect server; yields the parameters that lead a flow to them."""
    store = store_url or f"file://{directory / 'store'}"
    with ExitStack() as stack:
        os.environ.update(demo_environment(directory, store))
        os.environ.pop("RAY_ADDRESS", None)
        with console.status(f"Starting Ray with {CPUS} CPUs"):
            from workers.cluster import ray_session

            stack.enter_context(ray_session(num_cpus=CPUS))
        # Ray has put a handler of its own in the way of SIGTERM
        interrupt_on_signals()
        with console.status("Starting a Prefect server"):
            environment = stack.enter_context(prefect_server(directory / "prefect"))
        os.environ.update(environment)
        console.print(
            f"Prefect: {environment['PREFECT_API_URL'].removesuffix('/api')}\nStorage: {store}", soft_wrap=True
        )
        yield {"store_url": store, "port": free_port()}
        console.print("Stopping Prefect and Ray ...")


def demo_environment(directory: Path, store: str) -> dict[str, str]:
    return {
        # a fresh cache: a second demo would otherwise resume the first one's training instead of showing it
        "DIFFUSION_BLEND_CACHE_DIR": str(directory / "cache"),
        "DIFFUSION_BLEND_STORE_URL": store,
        # the demo shows steps and bars of its own
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # a task that outlives its cluster must fail, not start another one
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }


def run_pipeline(flow: Callable[..., dict[str, Any]], parameters: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Run a flow in a thread, so that this one can show its steps and be interrupted at any time."""
    from prefect.client.orchestration import get_client

    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = flow(**parameters)
        except BaseException as error:
            (directory / "error.log").write_text(traceback.format_exc())
            outcome["error"] = error
        finally:
            flush_logs()

    thread = threading.Thread(target=work, daemon=True, name="flow")
    thread.start()
    shown: list[str] = []
    with get_client(sync_client=True) as client:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            show_steps(client, shown)
    if error := outcome.get("error"):
        where = f"after step {shown[-1]!r}" if shown else "before its first step"
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RuntimeError(
            f"the demo failed {where}: {first_line}. See {directory / 'error.log'} and /tmp/ray/session_latest/logs; "
            "then run it again, it starts afresh"
        ) from error
    return outcome["result"]


def flush_logs() -> None:
    """Send what Prefect still holds back while its server is there."""
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()


def show_steps(client: "SyncPrefectClient", shown: list[str]) -> None:
    """Print the names of task runs that have begun since the last call, and add them to `shown`."""
    from prefect.client.schemas.sorting import TaskRunSort
    from tqdm import tqdm

    try:
        runs = client.read_task_runs(sort=TaskRunSort.EXPECTED_START_TIME_ASC, limit=200)
    except Exception:
        # the steps are a courtesy: a busy server must not end the demo
        return
    for run in runs:
        # a subflow has a task run of its own, named by a UUID; other names end in three random characters
        name = re.sub(r"-(0|[0-9a-z]{3})$", "", run.name)
        if name not in shown and not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", name):
            shown.append(name)
            tqdm.write(f"{datetime.now():%H:%M:%S}  {name}")


def show_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Rewards before and after, what the evaluation says, and where everything is."""
    from infra.manifests import AdapterRecord
    from workers.basis import gain_table

    adapters = [AdapterRecord.model_validate(record) for record in summary["adapters"]]
    table = Table("reward", "base [95 %]", "tuned [95 %]", "gain in base std", title="Held-out reward")
    for row in gain_table(adapters):
        table.add_row(str(row["reward"]), str(row["base"]), str(row["tuned"]), f"{row['gain_in_base_std']:+.2f}")
    console.print(table)
    facts = {
        "report": summary["evaluation"]["report"],
        "image": summary["image"],
        "endpoint": summary["url"],
        "bundle": summary["bundle"],
        "seconds": summary["seconds"],
    }
    for sentence in summary["evaluation"]["headline"]:
        console.print(sentence, soft_wrap=True)
    for name, value in facts.items():
        console.print(f"{name:9} {value}", soft_wrap=True, highlight=False)


def wait_for_interrupt(console: Console) -> None:
    """Keep everything up until Ctrl-C."""
    console.print("The endpoint and the Prefect server stay up. Press Ctrl-C to end them.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print()
