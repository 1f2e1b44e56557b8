"""Verbs `generate`, `serve` and `deploy`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.transfer_bar import transfer_bar

if TYPE_CHECKING:
    from workers.api import GenerationRequest
    from workers.engine_args import EngineArgs

Bundle = Annotated[str | None, typer.Option("--bundle", help="NAME@ALIAS or NAME@VERSION; default sprites@champion.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model by directory or Hub id, with --adapter.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PATH", help="Basis adapter by path; repeatable."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
StoreUrl = Annotated[str | None, typer.Option("--store-url", help="Registry to look in; default: the settings.")]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on; default: the settings, 127.0.0.1.")]
Port = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, help="0 takes a free one; default: the settings, 8000.")
]


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(serve)
    app.command()(deploy)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", "-w", metavar="NAME=VALUE", help="Preference; values sum to 1; repeatable."),
    ] = None,
    kl_lambda: Annotated[
        float | None, typer.Option("--kl-lambda", help="0: base, 1: as tuned, above 1: extrapolated.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="mpa, ls or soup.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Drawn and printed when left out.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale", help="1 switches it off.")] = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", help="What to steer away from.")] = "",
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Default: the model's own.")] = None,
    bundle: Bundle = None,
    base: Base = None,
    adapter: Adapter = None,
    device: Device = "auto",
    store_url: StoreUrl = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask a running endpoint instead.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="Default: blend-SEED.png.")
    ] = None,
) -> None:
    """Generate one image for a prompt and a preference, in this process or at a running endpoint."""
    from workers.api import check_fields

    _check_output(output)
    fields: dict[str, Any] = {
        "prompt": prompt,
        "weights": {name: _number(name, value) for name, value in _pairs("-w", weight).items()} or None,
        "kl_lambda": kl_lambda,
        "method": method,
        "normalize": normalize,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "size": size,
    }
    request = check_fields(fields)
    if url is not None:
        if base or adapter or bundle or store_url:
            raise typer.BadParameter("the endpoint at --url has its own bundle: leave the bundle options out")
        png, seed = _ask_endpoint(url, request)
    else:
        png, seed = _generate_here(_engine_args(bundle, base, adapter, device, store_url), request)
    path = output or _free_name(seed)
    path.write_bytes(png)
    typer.echo(path)


def serve(
    bundle: Bundle = None,
    base: Base = None,
    adapter: Adapter = None,
    host: Host = None,
    port: Port = None,
    device: Device = "auto",
    store_url: StoreUrl = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Engines, one per device.")] = 1,
    max_queue: Annotated[
        float, typer.Option("--max-queue", min=0.1, help="Seconds of work that may wait before clients get 429.")
    ] = 20.0,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="File with NAME SCOPES SHA256 a line; clients then need a token.")
    ] = None,
) -> None:
    """Serve a bundle over HTTP on Ray Serve until Ctrl-C."""
    from infra.settings import read_settings
    from workers.deploying import check_port
    from workers.engine_args import ServeArgs

    settings = read_settings()
    args = _engine_args(bundle, base, adapter, device, store_url).model_dump()
    args |= {"num_replicas": replicas, "max_queue_s": max_queue, "num_threads": settings.num_threads}
    host = host or settings.host
    port = check_port(host, settings.port if port is None else port)
    typer.echo("Checking the bundle and starting Ray Serve ...", err=True)
    _serve_until_stopped(ServeArgs.model_validate(args), host, port)


def deploy(
    bundle: Annotated[str, typer.Option("--bundle", help="NAME@ALIAS or NAME@VERSION.")] = "sprites@champion",
    host: Host = None,
    port: Port = None,
    store_url: StoreUrl = None,
    address: Annotated[str | None, typer.Option("--address", help="Ray cluster; default: RAY_ADDRESS.")] = None,
) -> None:
    """Deploy a bundle on a running Ray cluster (Prefect flow) and try it with one request."""
    from flows.deploy_blend import deploy_blend

    typer.echo(deploy_blend(bundle=bundle, store_url=store_url, host=host, port=port, address=address))


def _ask_endpoint(url: str, request: "GenerationRequest") -> tuple[bytes, int]:
    import base64

    from workers.client import request_images

    began = time.perf_counter()
    typer.echo(f"Asking {url} ...", err=True)
    answer = request_images(url, request)
    image = answer.data[0]
    _tell(answer.bundle.name, answer.weights, image.seed, time.perf_counter() - began)
    return base64.b64decode(image.b64_json), image.seed


def _generate_here(args: "EngineArgs", request: "GenerationRequest") -> tuple[bytes, int]:
    from tqdm import tqdm

    typer.echo(f"Loading {args.base or args.bundle_ref} ...", err=True)
    from transformers.utils import logging

    from workers.generation import generate_png, plan
    from workers.loading import open_engine

    # Two bars for one image are one too many.
    logging.disable_progress_bar()
    with transfer_bar("Fetching adapters") as on_bytes:
        opened = open_engine(args, on_bytes)
    if request.weights is None and opened.card.defaults.weights is None:
        example = " ".join(f"-w {name}={int(i == 0)}" for i, name in enumerate(opened.basis))
        raise typer.BadParameter(f"this bundle has no default preference: give it, for example {example}")
    [sample] = plan(request, opened)
    began = time.perf_counter()
    with tqdm(total=sample.num_inference_steps, desc="Denoising", unit="step") as bar:
        [png] = generate_png([sample], opened, lambda done, total: bar.update(done - bar.n))
    seconds = time.perf_counter() - began
    _tell(opened.card.bundle.name, sample.preference.weights, sample.seed, seconds)
    return png, sample.seed


def _tell(bundle: str, weights: dict[str, float], seed: int, seconds: float) -> None:
    named = " ".join(f"{name}={value:g}" for name, value in weights.items())
    typer.echo(f"{bundle}: {named}, seed {seed}, {seconds:.1f} s", err=True)


def _serve_until_stopped(args: Any, host: str, port: int) -> None:
    import signal
    import threading

    from workers.client import request_card
    from workers.cluster import ray_session
    from workers.deploying import deploy, undeploy
    from workers.loading import pin

    with transfer_bar("Fetching adapters") as on_bytes:
        pin(args, on_bytes)
    with ray_session():
        url = deploy(args, host=host, port=port)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        card = request_card(url)
        typer.echo(f"{card.id} is ready at {url} (Ctrl-C stops it). Try:\n\n{card.curl_example(url)}\n")
        while not stop.wait(1.0):
            pass
        typer.echo("Stopping ...", err=True)
        undeploy()


def _engine_args(
    bundle: str | None, base: str | None, adapter: Sequence[str] | None, device: str, store_url: str | None
) -> "EngineArgs":
    from workers.engine_args import EngineArgs

    return EngineArgs(
        bundle=bundle, base=base, adapters=_pairs("--adapter", adapter), device=device, store_url=store_url
    )


def _pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """NAME=VALUE texts as a mapping; a name may come once."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option} {json.dumps(text)}: write NAME=VALUE")
        if name in found:
            raise typer.BadParameter(f"{option} {name}: given twice")
        found[name] = value
    return found


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"-w {name}={value}: {json.dumps(value)} is not a number") from None


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"-o {output}: the image is a PNG; end the name with .png")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o {output}: the directory {output.parent} does not exist; make it first")


def _free_name(seed: int) -> Path:
    """blend-SEED.png, or blend-SEED-2.png and so on: without -o nothing is overwritten."""
    path, count = Path(f"blend-{seed}.png"), 1
    while path.exists():
        count += 1
        path = Path(f"blend-{seed}-{count}.png")
    return path
