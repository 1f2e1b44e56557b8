"""Flow: put a bundle behind the endpoint on a lasting Ray cluster and prove that it answers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from workers.api import GenerationResponse
from workers.model_card import ModelCard


@flow(name="deploy-blend")
def deploy_blend(
    bundle: str = "sprites@champion",
    store_url: str | None = None,
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
    tokens: str | None = None,
) -> str:
    """Serve `bundle` and return the endpoint's URL; `address` or RAY_ADDRESS names the Ray cluster.

    `tokens`: a token file on the cluster's machines; then DIFFUSION_BLEND_TOKEN must hold one of them.
    """
    check_bundle(bundle, store_url)
    with lasting_cluster(address):
        url = start_endpoint(bundle, store_url, host, port, tokens)
    card, answer = smoke_request(url)
    report_endpoint(url, card, answer)
    return url


@task
def check_bundle(bundle: str, store_url: str | None) -> None:
    """Fetch and check the bundle before any cluster is asked for; what is wrong with it is told here."""
    from workers.engine_args import EngineArgs
    from workers.loading import pin

    pin(EngineArgs(bundle=bundle, store_url=store_url))


@contextmanager
def lasting_cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster that outlives this run; on a private one the endpoint would end with it."""
    import ray

    from workers.cluster import ray_session

    if address:
        os.environ["RAY_ADDRESS"] = address
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        raise RuntimeError(
            "no Ray cluster to deploy on: start one with `ray start --head` and set RAY_ADDRESS=auto "
            "(or pass --address), or run the endpoint in the foreground with `diffusion-blend serve`"
        )
    with ray_session():
        yield


@task
def start_endpoint(bundle: str, store_url: str | None, host: str | None, port: int | None, tokens: str | None) -> str:
    """Bring the Serve application up, or change the one that runs; return its URL."""
    from infra.settings import read_settings
    from workers.deploying import deploy
    from workers.engine_args import ServeArgs

    settings = read_settings()
    args = ServeArgs(bundle=bundle, store_url=store_url, tokens=tokens, num_threads=settings.num_threads)
    return deploy(args, host=host or settings.host, port=settings.port if port is None else port)


@task(retries=2, retry_delay_seconds=2)
def smoke_request(url: str) -> tuple[ModelCard, GenerationResponse]:
    """One small image through the new endpoint, from outside."""
    from workers.api import GenerationRequest
    from workers.client import request_card, request_images

    card = request_card(url)
    request = GenerationRequest(
        prompt="A red colored car.", weights=card.example_weights(), num_inference_steps=2, seed=0
    )
    answer = request_images(url, request)
    get_run_logger().info("%s answered in %.0f ms", url, answer.usage.denoise_ms)
    return card, answer


@task
def report_endpoint(url: str, card: ModelCard, answer: GenerationResponse) -> None:
    """Link to the endpoint and say what it serves."""
    create_link_artifact(key="endpoint", link=f"{url}/v1/models", link_text=f"{card.id} at {url}")
    basis = "\n".join(f"| {adapter.name} | {adapter.reward or 'unknown'} |" for adapter in card.basis)
    create_markdown_artifact(
        key="endpoint-facts",
        markdown=f"# {answer.bundle.name} at {url}\n\nDigest `{answer.bundle.digest}`. First image: "
        f"{answer.usage.rows} rows in {answer.usage.denoise_ms:.0f} ms.\n\n"
        f"| basis | reward |\n|---|---|\n{basis}\n\n```sh\n{card.curl_example(url)}\n```\n",
    )
