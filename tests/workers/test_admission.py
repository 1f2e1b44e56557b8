"""The service under pressure: a full queue, clients that leave, an engine that fails, and anything JSON can say."""

import asyncio
import json
import threading

import pytest
from endpoints import ROUTE
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import wait_for

from workers.api import GenerationRequest
from workers.generation import forecast, plan
from workers.routes import create_http
from workers.service import GenerationService

BASE = {
    "prompt": "a red car",
    "weights": {"warm": 0.25, "small": 0.75},
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
}
LONG = {**BASE, "num_inference_steps": 200, "n": 8}


def ask(client, **fields):
    return client.post(ROUTE, json={**BASE, **fields})


def test_a_full_queue_answers_429_with_numbers_and_recovers(client, service, opened):
    samples = plan(GenerationRequest(**LONG), opened)
    job = service.loop.enter(samples, forecast(samples, opened.basis))
    answer = ask(client)
    service.loop.leave(job)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert "UNet rows at" in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "rate_limit_error"
    wait_for(lambda: service.loop.in_flight == 0)
    assert ask(client).status_code == 200


def test_an_empty_queue_takes_a_request_of_any_size(client):
    # 8 images x 20 steps x 4 rows are more than the bound of 500
    assert len(ask(client, n=8, num_inference_steps=20).json()["data"]) == 8


def test_giving_up_frees_the_rows_at_once(service, opened):
    async def give_up() -> None:
        task = asyncio.create_task(service.generate(GenerationRequest(**LONG)))
        while opened.engine.idle:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    aborted = service.loop.counts["aborted"]
    asyncio.run(give_up())
    wait_for(lambda: service.loop.in_flight == 0 and opened.engine.idle)
    assert service.loop.counts["aborted"] == aborted + 1


def test_a_client_that_leaves_ends_its_work(service, opened):
    """The routes alone, spoken to in ASGI: the body, then a disconnect while the engine works."""
    app = create_http(service)
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": ROUTE, "raw_path": ROUTE.encode(), "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    sent: list[dict] = []

    async def run() -> None:
        first = {"type": "http.request", "body": json.dumps(LONG).encode(), "more_body": False}
        messages = [first]

        async def receive():
            if messages:
                return messages.pop()
            while opened.engine.idle:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] == 499
    wait_for(lambda: service.loop.in_flight == 0 and opened.engine.idle)


def test_a_failed_forward_is_a_503_until_one_succeeds(client, opened, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(opened.engine.model.unet, "forward", broken)
        answer = ask(client)
        assert answer.status_code == 503
        assert "secret" not in answer.text
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "RuntimeError" in ready.json()["error"]["message"]
    assert client.get("/readyz").status_code == 200
    assert ask(client).status_code == 200


def test_a_service_whose_engine_thread_has_ended_is_not_ready(opened):
    service = GenerationService(opened, max_queue_s=10.0)
    service.close()
    with TestClient(create_http(service)) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert ask(client).status_code == 503
    assert not [thread for thread in threading.enumerate() if thread is service.loop._thread]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from([*GenerationRequest.model_fields, "other"]), JSON, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["warm", "small"]), st.floats(), max_size=2) | st.just(BASE["weights"]),
)
def test_nothing_a_client_sends_is_a_5xx(client, fields, weights):
    text = json.dumps({**BASE, "num_inference_steps": 1, "weights": weights, **fields})
    answer = client.post(ROUTE, content=text.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
