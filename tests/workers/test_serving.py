"""The endpoint on a real Ray Serve instance: what HTTP clients see, and what happens to work that no one awaits."""

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from workers.api import GenerationRequest, RequestError
from workers.client import request_card, request_images
from workers.engine_args import EngineArgs, ServeArgs
from workers.generation import generate_png, plan, request_of
from workers.images import read_facts
from workers.loading import open_engine

pytestmark = pytest.mark.slow

ROUTE = "/v1/images/generations"
BASE = {"prompt": "a red car", "weights": {"warm": 0.25, "small": 0.75}, "num_inference_steps": 3}
# Minutes of work, had it to be finished.
LONG = {**BASE, "num_inference_steps": 200, "n": 8}


@pytest.fixture(scope="module")
def endpoint(cluster, tiny_sd_dir, tiny_adapters):
    from ray import serve

    from workers.serving import check_port, deploy, undeploy

    args = ServeArgs(base=str(tiny_sd_dir), adapters=tiny_adapters, max_queued_rows=2_000)
    yield deploy(args, host="127.0.0.1", port=check_port("127.0.0.1", 0))
    undeploy()
    serve.shutdown()


@pytest.fixture(scope="module")
def engine(endpoint):
    from ray import serve

    from workers.serving import APP_NAME

    return serve.get_deployment_handle("Engine", APP_NAME)


def figures(engine) -> dict[str, int]:
    return engine.figures.remote().result()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_it_listens_where_it_was_told_and_is_ready(endpoint):
    assert endpoint.startswith("http://127.0.0.1:")
    assert httpx.get(f"{endpoint}/healthz").json()["status"] == "up"
    ready = httpx.get(f"{endpoint}/readyz")
    assert ready.status_code == 200
    assert ready.json()["bundle"] == request_card(endpoint).bundle.model_dump()


def test_an_image_over_http_is_the_image_of_this_process_and_is_made_again_from_itself(
    endpoint, tiny_sd_dir, tiny_adapters
):
    answer = request_images(endpoint, GenerationRequest(**BASE, seed=3, kl_lambda=0.5))
    png = base64.b64decode(answer.data[0].b64_json)
    opened = open_engine(EngineArgs(base=str(tiny_sd_dir), adapters=tiny_adapters))
    facts = read_facts(png)
    assert generate_png(plan(request_of(facts), opened), opened) == [png]
    assert (facts.seed, facts.bundle_digest) == (answer.data[0].seed, answer.bundle.digest)
    assert request_images(endpoint, request_of(facts)).data[0].b64_json == answer.data[0].b64_json


def test_bad_requests_are_refused_with_the_same_words_on_both_sides_of_the_wire(endpoint):
    with pytest.raises(RequestError) as caught:
        request_images(endpoint, GenerationRequest(prompt="x", weights={"foo": 1.0}))
    assert (caught.value.refusal.status, caught.value.refusal.param) == (400, "weights.foo")
    assert "warm" in str(caught.value)
    for content, status in ((b"{", 400), (b'{"prompt": "x", "kl_lambda": NaN}', 400), (b" " * 70_000, 413)):
        answer = httpx.post(endpoint + ROUTE, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param"}


def test_many_clients_share_the_batch(endpoint):
    def ask(seed: int) -> str:
        return request_images(endpoint, GenerationRequest(**BASE, seed=seed)).data[0].b64_json

    with ThreadPoolExecutor(12) as pool:
        images = list(pool.map(ask, range(12)))
    assert len(set(images)) == 12


def test_a_client_that_hangs_up_frees_its_rows(endpoint, engine):
    before = figures(engine)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(endpoint + ROUTE, json=LONG, timeout=httpx.Timeout(10, read=0.7))
    wait_until(lambda: figures(engine)["in_flight"] == 0)
    assert figures(engine) == before | {"aborted": before["aborted"] + 1}


def test_a_full_queue_is_a_429_with_retry_after(endpoint, engine):
    def occupy() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(endpoint + ROUTE, json=LONG, timeout=httpx.Timeout(10, read=4.0))

    thread = threading.Thread(target=occupy)
    thread.start()
    wait_until(lambda: figures(engine)["in_flight"] == 1)
    answer = httpx.post(endpoint + ROUTE, json=BASE, timeout=30)
    thread.join()
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    wait_until(lambda: figures(engine)["in_flight"] == 0)
    assert httpx.post(endpoint + ROUTE, json=BASE, timeout=60).status_code == 200


def test_a_lost_replica_is_a_503_and_then_replaced(endpoint, engine):
    """The replica's process ends under a request; the next answer comes from its successor."""
    import os
    import signal

    pid = figures(engine)["pid"]
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(httpx.post, endpoint + ROUTE, json=LONG, timeout=120)
        wait_until(lambda: figures(engine)["in_flight"] == 1)
        os.kill(pid, signal.SIGKILL)
        answer = pending.result()
    assert answer.status_code == 503
    assert "send it again" in answer.json()["error"]["message"]
    wait_until(lambda: httpx.get(f"{endpoint}/readyz", timeout=60).status_code == 200, seconds=120)
    assert httpx.post(endpoint + ROUTE, json=BASE, timeout=60).status_code == 200
    assert figures(engine)["pid"] != pid


def test_deploying_again_replaces_the_bundle_in_place(endpoint, tiny_store_url):
    from infra.errors import UnknownRecordError
    from workers.serving import deploy

    before = request_card(endpoint).bundle
    with pytest.raises(UnknownRecordError, match="nothing"):
        deploy(ServeArgs(bundle="nothing@champion", store_url=tiny_store_url), port=1)
    assert request_card(endpoint).bundle == before, "a wrong bundle leaves the endpoint as it was"
    assert deploy(ServeArgs(bundle="tiny@champion", store_url=tiny_store_url), port=1) == endpoint
    card = request_card(endpoint)
    assert (card.bundle.name, card.bundle.version) == ("tiny", 1)
    assert card.bundle.digest != before.digest
    assert card.accepted_names == ["tiny", "tiny@1", "tiny@champion"]
    assert (card.defaults.num_inference_steps, card.defaults.guidance_scale) == (4, 2.0)
    assert [adapter.reward for adapter in card.basis] == ["colourfulness", "colourfulness"]


def test_the_deployment_file_names_real_arguments():
    import yaml
    from ray.serve.schema import ServeDeploySchema

    import infra

    text = (Path(infra.__file__).parent / "serve.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    [application] = schema.applications
    assert schema.http_options.host == "127.0.0.1"
    assert application.import_path == "workers.serving:build_app"
    assert ServeArgs.model_validate(application.args).bundle == "sprites@champion"
