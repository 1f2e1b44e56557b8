"""Verbs `serve` and `deploy`: the endpoint in the foreground, or on a cluster that outlives the command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_generate import Adapter, Base, Bundle, Device, StoreUrl, engine_args
from flows.transfer_bar import transfer_bar

if TYPE_CHECKING:
    from workers.engine_args import ServeArgs

Host = Annotated[str | None, typer.Option("--host", help="Address to listen on; default: the settings, 127.0.0.1.")]
Port = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, help="0 takes a free one; default: the settings, 8000.")
]

TokenFile = Annotated[
    Path | None, typer.Option("--tokens", help="File with NAME SCOPES SHA256 a line; clients then need a token.")
]


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(deploy)


def serve(
    bundle: Bundle = None,
    base: Base = None,
    adapter: Adapter = None,
    host: Host = None,
    port: Port = None,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", min=0, max=65535, help="Of the Prometheus page; default: a free one."),
    ] = None,
    device: Device = "auto",
    store_url: StoreUrl = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Engines, one per device.")] = 1,
    max_queue: Annotated[
        float, typer.Option("--max-queue", min=0.1, help="Seconds of work that may wait before clients get 429.")
    ] = 20.0,
    tokens: TokenFile = None,
) -> None:
    """Serve a bundle over HTTP on Ray Serve until Ctrl-C."""
    from infra.settings import read_settings
    from workers.deploying import check_port
    from workers.engine_args import ServeArgs

    settings = read_settings()
    args = engine_args(bundle, base, adapter, device, store_url).model_dump()
    args |= {
        "num_replicas": replicas,
        "max_queue_s": max_queue,
        "tokens": str(tokens.absolute()) if tokens else None,
        "num_threads": settings.num_threads,
    }
    host = host or settings.host
    port = check_port(host, settings.port if port is None else port)
    if metrics_port:
        check_port("0.0.0.0", metrics_port, "--metrics-port")
    typer.echo("Checking the bundle and starting Ray Serve ...", err=True)
    _serve_until_stopped(ServeArgs.model_validate(args), host, port, metrics_port)


def deploy(
    bundle: Annotated[str, typer.Option("--bundle", help="NAME@ALIAS or NAME@VERSION.")] = "sprites@champion",
    host: Host = None,
    port: Port = None,
    store_url: StoreUrl = None,
    address: Annotated[str | None, typer.Option("--address", help="Ray cluster; default: RAY_ADDRESS.")] = None,
    tokens: TokenFile = None,
) -> None:
    """Deploy a bundle on a running Ray cluster (Prefect flow) and try it with one request."""
    from flows.deploy_blend import deploy_blend

    file = str(tokens.absolute()) if tokens else None
    typer.echo(deploy_blend(bundle=bundle, store_url=store_url, host=host, port=port, address=address, tokens=file))


def _serve_until_stopped(args: "ServeArgs", host: str, port: int, metrics_port: int | None) -> None:
    import signal
    import threading

    from workers.cluster import ray_session
    from workers.deploying import deploy, served_card, undeploy
    from workers.loading import pin
    from workers.whereabouts import log_files, metrics_pages

    with transfer_bar("Fetching adapters") as on_bytes:
        pin(args, on_bytes)
    with ray_session(metrics_port=metrics_port):
        url = deploy(args, host=host, port=port)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        card = served_card()
        example = card.curl_example(url, with_token=args.tokens is not None)
        typer.echo(f"{card.id} is ready at {url} (Ctrl-C stops it). Open that in a browser, or try:\n\n{example}\n")
        typer.echo(f"Metrics: {' '.join(metrics_pages()) or 'switched off'}\nLogs: {log_files()}")
        while not stop.wait(1.0):
            pass
        typer.echo("Stopping ...", err=True)
        undeploy()
