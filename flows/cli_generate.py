"""Verb `generate`, and the options that name what is loaded."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", "-w", metavar="NAME=VALUE", help="Preference; values sum to 1; repeatable."),
    ] = None,
    kl_lambda: Annotated[
        float | None, typer.Option("--kl-lambda", help="0: base, 1: as tuned, above 1: extrapolated.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="mpa, staged, ls, soup or cached.")] = None,
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
    token: Annotated[
        str | None, typer.Option("--token", help="For that endpoint; default: DIFFUSION_BLEND_TOKEN.")
    ] = None,
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
        png, seed = _ask_endpoint(url, request, token)
    else:
        png, seed = _generate_here(engine_args(bundle, base, adapter, device, store_url), request)
    path = output or _free_name(seed)
    path.write_bytes(png)
    typer.echo(path)


def _ask_endpoint(url: str, request: "GenerationRequest", token: str | None) -> tuple[bytes, int]:
    import base64

    from workers.client import stream_images

    began = time.perf_counter()
    typer.echo(f"Asking {url} ...", err=True)
    with _steps_bar() as on_step:
        [image] = stream_images(url, request, on_step, token)
    _tell(image.bundle.name, image.weights, image.seed, time.perf_counter() - began)
    return base64.b64decode(image.b64_json), image.seed


@contextmanager
def _steps_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar that is told (steps done, steps in all)."""
    from tqdm import tqdm

    with tqdm(desc="Denoising", unit="step") as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_step


def _generate_here(args: "EngineArgs", request: "GenerationRequest") -> tuple[bytes, int]:
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
    with _steps_bar() as on_step:
        [png] = generate_png([sample], opened, on_step)
    seconds = time.perf_counter() - began
    _tell(opened.card.bundle.name, sample.preference.weights, sample.seed, seconds)
    return png, sample.seed


def _tell(bundle: str, weights: dict[str, float], seed: int, seconds: float) -> None:
    named = " ".join(f"{name}={value:g}" for name, value in weights.items())
    typer.echo(f"{bundle}: {named}, seed {seed}, {seconds:.1f} s", err=True)


def engine_args(
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
