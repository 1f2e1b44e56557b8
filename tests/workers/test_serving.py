"""The endpoint on a real Ray Serve instance: what clients see, and what happens when something is lost or changed."""

import base64
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from endpoints import ROUTE, events_of, token_file
from waiting import wait_for

from workers.api import GenerationRequest, RequestError
from workers.client import request_bundle, request_card, request_images, stream_images
from workers.engine_args import EngineArgs, ServeArgs
from workers.generation import generate_png, plan, request_of
from workers.images import read_facts
from workers.loading import open_engine

pytestmark = pytest.mark.slow

BASE = {"prompt": "a red car", "weights": {"warm": 0.25, "small": 0.75}, "num_inference_steps": 3}
# Minutes of work, had it to be finished.
LONG = {**BASE, "num_inference_steps": 200, "n": 8}
USER, ADMIN = "a-user's-secret", "the-operator's-secret"
HEADERS = {"Authorization": f"Bearer {USER}"}


@pytest.fixture(scope="module")
def store_url(tiny_store_url, tmp_path_factory):
    """A store of this module's own: tiny@1 is the champion, tiny@2 holds the same adapters under other defaults."""
    import shutil

    from infra.manifests import BundleDefaults
    from infra.registry import Registry
    from infra.storage import open_store

    root = tmp_path_factory.mktemp("served") / "store"
    shutil.copytree(tiny_store_url.removeprefix("file://"), root)
    registry = Registry(open_store(f"file://{root}"))
    first = registry.get_bundle("tiny@1")
    registry.publish_bundle(
        "tiny",
        first.base,
        {name: registry.get_adapter(name) for name in first.adapters},
        defaults=BundleDefaults(guidance_scale=3.0, num_inference_steps=5),
    )
    return f"file://{root}"


@pytest.fixture(scope="module")
def args(store_url, tmp_path_factory):
    tokens = token_file(tmp_path_factory.mktemp("t") / "tokens", alice=("images", USER), deploy=("images,admin", ADMIN))
    return ServeArgs(
        bundle="tiny@champion", store_url=store_url, tokens=str(tokens), max_queue_s=30.0, follow_alias_s=0.3
    )


@pytest.fixture(scope="module")
def endpoint(cluster, args):
    from ray import serve

    from workers.deploying import check_port, deploy, undeploy

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSION_BLEND_TOKEN", USER)
        try:
            yield deploy(args, host="127.0.0.1", port=check_port("127.0.0.1", 0))
        finally:
            # what is left running would keep the cluster's processors from the tests that come after
            undeploy()
            serve.shutdown()


@pytest.fixture(scope="module")
def engine(endpoint):
    from ray import serve

    from workers.deploying import APP_NAME, ENGINE

    return serve.get_deployment_handle(ENGINE, APP_NAME)


def figures(engine) -> dict[str, int]:
    return engine.figures.remote().result()


def ask(endpoint, **fields) -> httpx.Response:
    return httpx.post(endpoint + ROUTE, json={**BASE, **fields}, headers=HEADERS, timeout=120)


def test_it_listens_where_it_was_told_and_is_ready(endpoint):
    assert endpoint.startswith("http://127.0.0.1:")
    assert httpx.get(f"{endpoint}/healthz").json()["status"] == "up"
    ready = httpx.get(f"{endpoint}/readyz")
    assert ready.status_code == 200
    assert ready.json()["bundle"] == request_card(endpoint).bundle.model_dump()
    assert "Diffusion Blend" in httpx.get(endpoint).text


def test_without_a_token_there_are_no_images(endpoint):
    refused = httpx.post(endpoint + ROUTE, json=BASE)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(RequestError, match="DIFFUSION_BLEND_TOKEN"):
        request_card(endpoint, "not-a-token")


def test_an_image_over_http_is_the_image_of_this_process_and_is_made_again_from_itself(endpoint, store_url):
    answer = request_images(endpoint, GenerationRequest(**BASE, seed=3, kl_lambda=0.5))
    png = base64.b64decode(answer.data[0].b64_json)
    opened = open_engine(EngineArgs(bundle="tiny@1", store_url=store_url))
    facts = read_facts(png)
    assert generate_png(plan(request_of(facts), opened), opened) == [png]
    assert (facts.seed, facts.bundle_digest) == (answer.data[0].seed, answer.bundle.digest)
    assert request_images(endpoint, request_of(facts)).data[0].b64_json == answer.data[0].b64_json


def test_a_stream_tells_every_step_and_ends_with_the_same_image(endpoint):
    steps: list[tuple[int, int]] = []
    [image] = stream_images(endpoint, GenerationRequest(**BASE, seed=3), lambda *step: steps.append(step))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert image.b64_json == request_images(endpoint, GenerationRequest(**BASE, seed=3)).data[0].b64_json


def test_bad_requests_are_refused_with_the_same_words_on_both_sides_of_the_wire(endpoint):
    for send in (request_images, lambda url, request: stream_images(url, request, lambda *_: None)):
        with pytest.raises(RequestError) as caught:
            send(endpoint, GenerationRequest(prompt="x", weights={"foo": 1.0}))
        assert (caught.value.refusal.status, caught.value.refusal.param) == (400, "weights.foo")
        assert "warm" in str(caught.value)
    for content, status in ((b"{", 400), (b'{"prompt": "x", "kl_lambda": NaN}', 400), (b" " * 70_000, 413)):
        sent = {**HEADERS, "Content-Type": "application/json"}
        answer = httpx.post(endpoint + ROUTE, content=content, headers=sent)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param"}


def test_clients_that_hang_up_free_their_rows_streaming_or_not(endpoint, engine):
    before = figures(engine)["aborted"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(endpoint + ROUTE, json=LONG, headers=HEADERS, timeout=httpx.Timeout(10, read=2.0))
    wait_for(lambda: figures(engine)["in_flight"] == 0)
    for _ in range(5):
        with httpx.stream("POST", endpoint + ROUTE, json={**LONG, "stream": True}, headers=HEADERS) as reply:
            assert next(events_of(reply))["step"] == 0
        wait_for(lambda: figures(engine)["in_flight"] == 0)
    assert figures(engine)["aborted"] == before + 6


def test_a_full_queue_is_a_429_with_retry_after(endpoint, engine):
    with httpx.stream("POST", endpoint + ROUTE, json={**LONG, "stream": True}, headers=HEADERS, timeout=120) as reply:
        events = events_of(reply)  # dropping it would hang up
        next(events)
        answer = ask(endpoint, n=8, num_inference_steps=200)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    wait_for(lambda: figures(engine)["in_flight"] == 0)
    assert ask(endpoint).status_code == 200


@pytest.mark.long
def test_a_lost_replica_costs_no_client_an_error(endpoint, engine):
    """The replica's process ends under requests; its successor makes the same images, the streamed one too."""
    pid = figures(engine)["pid"]
    work = {"num_inference_steps": 60}
    begun = threading.Event()

    def stream(seed: int) -> list[dict]:
        body = {**BASE, **work, "seed": seed, "stream": True}
        with httpx.stream("POST", endpoint + ROUTE, json=body, headers=HEADERS, timeout=240) as reply:
            assert reply.status_code == 200, reply.read()
            events = []
            for event in events_of(reply):
                begun.set()
                events.append(event)
            return events

    with ThreadPoolExecutor(3) as pool:
        streamed = pool.submit(stream, 3)
        wait_for(lambda: begun.is_set() or streamed.done())
        pending = [pool.submit(ask, endpoint, seed=seed, **work) for seed in (1, 2)]
        wait_for(lambda: figures(engine)["in_flight"] == 3 or streamed.done())
        os.kill(pid, signal.SIGKILL)
        answers, events = [one.result() for one in pending], streamed.result()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert figures(engine)["pid"] != pid
    for seed, answer in zip((1, 2), answers, strict=True):
        assert answer.json()["data"] == ask(endpoint, seed=seed, **work).json()["data"]
    told = [event["step"] for event in events if event["type"] == "blend.progress"]
    assert told == list(range(61)), "every step once, though the first ones were made twice"
    images = [event["b64_json"] for event in events if event["type"] == "image_generation.completed"]
    assert images == [one["b64_json"] for one in ask(endpoint, seed=3, **work).json()["data"]]


def test_the_bundle_is_changed_under_load_without_losing_a_request(endpoint):
    before = request_card(endpoint).bundle
    stop = threading.Event()

    def keep_asking(seed: int) -> list[httpx.Response]:
        answers = []
        while not stop.is_set():
            answers.append(ask(endpoint, seed=seed))
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, seed) for seed in range(3)]
        try:
            changed = request_bundle(endpoint, "tiny@2", ADMIN)
        finally:
            stop.set()
        answers = [answer for one in asking for answer in one.result()]
    assert changed.bundle.version == 2
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        facts = read_facts(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        assert facts.bundle_digest == answer.json()["bundle"]["digest"] in (before.digest, changed.bundle.digest)
    assert request_card(endpoint).bundle == changed.bundle
    assert ask(endpoint).json()["bundle"]["version"] == 2


def test_only_an_administrator_changes_the_bundle_and_only_to_one_that_exists(endpoint):
    for bundle, token, status in (("tiny@1", USER, 403), ("tiny@9", ADMIN, 404), ("s3://elsewhere/x", ADMIN, 400)):
        with pytest.raises(RequestError) as caught:
            request_bundle(endpoint, bundle, token)
        assert caught.value.refusal.status == status
    assert request_card(endpoint).bundle.version == 2


def test_a_wrong_bundle_in_the_configuration_leaves_the_old_one_serving_and_readyz_says_why(endpoint):
    from workers.deploying import change_bundle

    change_bundle("nothing@1")
    wait_for(lambda: httpx.get(f"{endpoint}/readyz", timeout=60).json().get("warning"))
    ready = httpx.get(f"{endpoint}/readyz", timeout=60)
    assert ready.status_code == 200
    assert "nothing@1 could not be loaded" in ready.json()["warning"]
    assert ask(endpoint).json()["bundle"]["version"] == 2


def test_an_alias_is_followed_and_a_store_that_is_gone_is_done_without(endpoint, store_url):
    from infra.registry import Registry
    from infra.storage import open_store

    assert request_bundle(endpoint, "tiny@champion", ADMIN).bundle.version == 1
    assert httpx.get(f"{endpoint}/readyz", timeout=60).json()["warning"] is None
    Registry(open_store(store_url)).promote("tiny", 2, actor="tests", reason="better")
    wait_for(lambda: request_card(endpoint).bundle.version == 2)
    place = Path(store_url.removeprefix("file://"))
    place.rename(place.with_name("away"))
    try:
        wait_for(lambda: httpx.get(f"{endpoint}/readyz", timeout=60).json()["warning"])
        assert ask(endpoint).json()["bundle"]["version"] == 2
    finally:
        place.with_name("away").rename(place)
    wait_for(lambda: httpx.get(f"{endpoint}/readyz", timeout=60).json()["warning"] is None)


def test_deploying_again_changes_the_bundle_in_place(endpoint, engine, args):
    from infra.errors import UnknownRecordError
    from workers.deploying import deploy

    pid = figures(engine)["pid"]
    with pytest.raises(UnknownRecordError, match="nothing"):
        deploy(args.model_copy(update={"bundle": "nothing@champion"}), port=1)
    assert deploy(args.model_copy(update={"bundle": "tiny@1"}), port=1) == endpoint
    card = request_card(endpoint)
    assert card.accepted_names == ["tiny", "tiny@1"]
    assert (card.defaults.num_inference_steps, card.defaults.guidance_scale) == (4, 2.0)
    assert [adapter.reward for adapter in card.basis] == ["colourfulness", "colourfulness"]
    assert figures(engine)["pid"] == pid, "the replica went on"


def test_taking_it_down_lets_requests_end(endpoint, engine):
    from workers.deploying import undeploy

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(ask, endpoint, num_inference_steps=100, n=2)
        wait_for(lambda: figures(engine)["in_flight"] == 1)
        undeploy()
        assert pending.result().status_code == 200


def test_the_deployment_file_names_real_arguments():
    import yaml
    from ray.serve.schema import ServeDeploySchema

    import infra

    text = (Path(infra.__file__).parent / "serve.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    [application] = schema.applications
    assert schema.http_options.host == "127.0.0.1"
    assert application.import_path == "workers.serving:build_app"
    assert ServeArgs.model_validate(application.args).max_queue_s == 20
    [engine] = application.deployments
    assert (engine.name, engine.user_config) == ("Engine", {"bundle": "sprites@champion"})
