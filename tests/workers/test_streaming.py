"""Streamed answers over the real engine: the events, that they change no image, and that a client may leave."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from endpoints import ROUTE, events_of
from PIL import Image
from waiting import wait_for

from workers.api import Caller, GenerationRequest, Refusal
from workers.images import ImageFactsError, read_facts
from workers.routes import create_http
from workers.service import GenerationService
from workers.streaming import encode_event

BASE = {
    "prompt": "a red car",
    "weights": {"warm": 0.25, "small": 0.75},
    "num_inference_steps": 6,
    "guidance_scale": 2.0,
    "seed": 5,
}
LONG = {**BASE, "num_inference_steps": 200, "n": 8}


def stream(client, headers=None, **fields) -> list[dict]:
    with client.stream("POST", ROUTE, json={**BASE, "stream": True, **fields}, headers=headers) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        return list(events_of(reply))


def pixels(event: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))


def of(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["type"].endswith(kind)]


def test_progress_counts_every_step_and_the_last_event_is_the_image(client):
    events = stream(client)
    assert [(event["step"], event["total"]) for event in of(events, "progress")] == [(step, 6) for step in range(7)]
    [image] = of(events, "completed")
    assert events[-1] is image
    plain = client.post(ROUTE, json=BASE).json()
    assert image["b64_json"] == plain["data"][0]["b64_json"]
    for name in ("bundle", "weights", "kl_lambda", "method"):
        assert image[name] == plain[name]
    assert (image["seed"], image["usage"]["rows"]) == (5, plain["usage"]["rows"])
    assert (image["size"], image["output_format"]) == ("32x32", "png")


def test_previews_come_in_order_and_leave_the_image_as_it_is(client):
    events = stream(client, partial_images=3)
    previews = of(events, "partial_image")
    assert [event["partial_image_index"] for event in previews] == [0, 1, 2]
    assert [event["step"] for event in previews] == [2, 3, 4]
    assert of(events, "completed")[0]["b64_json"] == of(stream(client), "completed")[0]["b64_json"]
    with pytest.raises(ImageFactsError):
        read_facts(base64.b64decode(previews[0]["b64_json"]))
    final = pixels(of(events, "completed")[0]).astype(float)

    def distance(event: dict) -> float:
        small = pixels(event).astype(float)
        scale = final.shape[0] // small.shape[0]
        return float(np.abs(small.repeat(scale, 0).repeat(scale, 1) - final).mean())

    assert distance(previews[-1]) < distance(previews[0])


def test_several_images_are_told_apart(client):
    events = stream(client, n=3, partial_images=1)
    assert [event["seed"] for event in of(events, "completed")] == [5, 6, 7]
    assert sorted(event["image_index"] for event in of(events, "partial_image")) == [0, 1, 2]
    assert [event["step"] for event in of(events, "progress")] == list(range(7))


@pytest.mark.parametrize(("fields", "status"), [({"weights": {"foo": 1.0}}, 400), ({"model": "other"}, 404)])
def test_what_is_refused_before_it_begins_is_a_plain_answer(client, fields, status):
    answer = client.post(ROUTE, json={**BASE, "stream": True, **fields})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"


def test_a_failure_on_the_way_is_an_error_event(client, opened, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(opened.engine.model.unet, "forward", broken)
        events = [event for event in stream_raw(client) if "error" in event]
    assert len(events) == 1
    assert events[0]["error"]["type"] == "unavailable_error"
    assert events[0]["error"]["retry_after_s"] == 5
    assert "secret" not in json.dumps(events)
    assert client.get("/readyz").status_code == 200


def stream_raw(client) -> list[dict]:
    with client.stream("POST", ROUTE, json={**BASE, "stream": True}) as reply:
        return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]


def test_a_deadline_that_passes_ends_the_work(client, service):
    late = client.post(ROUTE, json=LONG, headers={"X-Request-Timeout": "0.3"})
    assert late.status_code == 408
    assert late.json()["error"]["type"] == "timeout_error"
    wait_for(lambda: service.loop.in_flight == 0 and service.opened.engine.idle)


def test_no_one_waits_longer_than_the_bound_even_where_the_forecast_was_wrong(opened):
    """A machine that is taken for a fast one lets too much in; what has not begun by then is turned away."""
    service = GenerationService(opened, max_queue_s=0.5)
    for _ in range(200):
        service.loop._rate.observe(1e6, 1e-3, weight=1.0)

    async def run() -> list:
        request = GenerationRequest(**{**BASE, "n": 2, "num_inference_steps": 30})
        return await asyncio.gather(*(service.generate(request, Caller(client=str(i))) for i in range(24)))

    answers = asyncio.run(run())
    refused = [answer for answer in answers if isinstance(answer, Refusal)]
    assert {answer.status for answer in refused} == {429}
    assert all("has waited 0.5 s" in answer.message and answer.retry_after_s >= 1 for answer in refused)
    # 30 steps of 2 images, conditional and not, for two adapters
    assert all(f"({30 * 2 * 4} UNet rows at" in answer.message for answer in refused)
    assert all(answer.usage.queue_ms < 1e3 * 2 for answer in answers if not isinstance(answer, Refusal))
    assert len(refused) < len(answers)
    wait_for(lambda: service.loop.in_flight == 0)
    service.close()
    service.close()


def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_its_work(service, opened):
    """The routes alone, spoken to in ASGI: the body, some events, then a disconnect."""
    sent: list[dict] = []
    body = {"type": "http.request", "body": json.dumps({**LONG, "stream": True}).encode(), "more_body": False}
    scope = {
        "type": "http", "method": "POST", "path": ROUTE, "raw_path": ROUTE.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip

    async def run() -> None:
        messages = [body]
        enough = asyncio.Event()

        async def receive():
            if messages:
                return messages.pop()
            await enough.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) > 3:
                enough.set()

        await create_http(service)(scope, receive, send)

    aborted = service.loop.counts["aborted"]
    asyncio.run(run())
    wait_for(lambda: service.loop.in_flight == 0 and opened.engine.idle)
    assert service.loop.counts["aborted"] == aborted + 1
    assert sent[-1].get("more_body"), "nothing was said after the client had left"


def test_clients_share_the_engine_whoever_asked_first(opened):
    """One client queues eight requests; another's single one, which came last, is not the last to be answered."""
    service = GenerationService(opened, max_queue_s=600.0)
    order: list[str] = []

    async def ask(client: str, seed: int) -> None:
        request = GenerationRequest(**{**BASE, "n": 8, "num_inference_steps": 4, "seed": seed})
        await service.generate(request, Caller(client=client))
        order.append(client)

    async def run() -> None:
        greedy = [asyncio.create_task(ask("greedy", seed)) for seed in range(0, 80, 10)]
        await asyncio.sleep(0)
        await asyncio.gather(*greedy, ask("modest", 100))

    asyncio.run(run())
    service.close()
    assert "modest" in order[:4], order


def test_health_is_a_forward_when_idle_and_progress_when_busy(opened, monkeypatch):
    from workers.jobs import EngineFaultError

    service = GenerationService(opened, max_queue_s=60.0)
    rate = service.loop.rows_per_s
    asyncio.run(service.check())
    assert service.loop.rows_per_s != rate, "a row was run"
    assert service.loop.counts["finished"] == 0, "and counted as no one's"
    monkeypatch.setattr("workers.service.STALL_S", -1.0)
    job = service._enter(GenerationRequest(**LONG), Caller())
    with pytest.raises(EngineFaultError, match="has not ended a step"):
        asyncio.run(service.check())
    service.loop.leave(job)
    service.close()
    with pytest.raises(EngineFaultError, match="ended"):
        asyncio.run(service.check())


def test_a_refusal_after_a_stream_began_says_when_to_try_again_as_the_header_would_have(opened):
    """The same wrong forecast: the last in the queue are turned away when their streams have begun."""
    service = GenerationService(opened, max_queue_s=0.5)
    for _ in range(200):
        service.loop._rate.observe(1e6, 1e-3, weight=1.0)
    request = GenerationRequest(**{**BASE, "n": 2, "num_inference_steps": 30, "stream": True})

    async def follow(client: str) -> list:
        return [event async for event in service.stream(request, Caller(client=client))]

    async def run() -> list:
        return await asyncio.gather(*(follow(str(i)) for i in range(24)))

    ends = [events[-1] for events in asyncio.run(run()) if isinstance(events[-1], Refusal) and len(events) > 1]
    assert ends
    for refusal in ends:
        told = json.loads(encode_event(refusal).decode().split("data: ")[1])["error"]
        assert told["type"] == "rate_limit_error"
        assert told["retry_after_s"] == refusal.retry_after_s >= 1
    wait_for(lambda: service.loop.in_flight == 0)
    service.close()
