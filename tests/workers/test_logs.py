"""The endpoint's log: one JSON object a line, a request's id in each of its lines, no prompt and no token."""

import asyncio
import json
import logging
from datetime import UTC, datetime, timedelta
from logging.handlers import MemoryHandler

import pytest
from endpoints import ROUTE, token_file
from fastapi.testclient import TestClient

from workers.api import Refusal
from workers.events import ProgressEvent
from workers.logs import AUDIT, audit, log_as_json
from workers.metrics import Metrics
from workers.routes import create_http
from workers.tokens import Tokens

PROMPT, NEGATIVE, TOKEN, ADMIN = "a crimson zeppelin", "grey moor", "token-of-alice", "token-of-ops"
BODY = {"prompt": PROMPT, "weights": {"warm": 0.25, "small": 0.75}, "num_inference_steps": 3}
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def lines(tmp_path):
    """Reads what was logged since; the loggers are as before when the test ends."""
    loggers = [logging.getLogger(name) for name in ("workers", AUDIT)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    path = tmp_path / "log.jsonl"
    log_as_json(path)
    yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
    for logger in loggers:
        for handler in logger.handlers:
            handler.close()
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture
def http(service, tmp_path):
    tokens = token_file(tmp_path / "tokens", alice=("images", TOKEN), ops=("images,admin", ADMIN))
    with TestClient(create_http(service, tokens=Tokens(tokens))) as client:
        yield client


def test_a_line_says_when_how_grave_where_and_what(lines):
    logging.getLogger("workers.somewhere").warning("bundle_refused", extra={"facts": {"bundle": "x@1", "n": 2}})
    [line] = lines()
    assert list(line) == ["time", "level", "logger", "event", "bundle", "n"]
    assert (line["level"], line["logger"], line["event"]) == ("warning", "workers.somewhere", "bundle_refused")
    assert abs(datetime.fromisoformat(line["time"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_whatever_is_in_a_record_it_is_one_line(lines):
    log = logging.getLogger("workers.somewhere")
    log.info("two\nlines\r\nand \u2028 more \x85 \x00", extra={"facts": {"what": {"a\n": object()}}})
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("failed")
    told = lines()
    assert len(told) == 2
    assert told[0]["event"].startswith("two\nlines")
    assert "first\nsecond" in told[1]["traceback"]


def test_debug_chatter_and_other_libraries_stay_out(lines):
    logging.getLogger("workers.somewhere").debug("chatter")
    logging.getLogger("elsewhere").error("not ours")
    assert lines() == []


def test_a_request_is_followed_by_its_id_from_the_first_line_to_the_last(http, lines):
    assert http.post(ROUTE, json=BODY, headers={**HEADERS, "X-Request-ID": "job-7.a_b"}).status_code == 200
    assert http.post(ROUTE, json={**BODY, "stream": True}, headers={**HEADERS, "X-Request-ID": "s"}).status_code == 200
    for request_id in ("job-7.a_b", "s"):
        mine = [line for line in lines() if line.get("request_id") == request_id]
        assert [line["event"] for line in mine] == ["taken_in", "answered", "request"]
        assert mine[0]["rows"] == mine[1]["rows"] == 12
        assert (mine[1]["method"], mine[1]["images"]) == ("mpa", 1)
        assert (mine[2]["client"], mine[2]["route"], mine[2]["status"]) == ("alice", ROUTE, 200)


def test_a_refused_request_says_so_on_both_sides(http, lines):
    http.post(ROUTE, json={**BODY, "weights": {"foo": 1.0}}, headers={**HEADERS, "X-Request-ID": "r"})
    refused, request = lines()
    assert refused["event"] == "refused"
    assert refused["request_id"] == request["request_id"] == "r"
    assert refused["status"] == request["status"] == 400
    assert refused["param"] == "weights"


def test_ids_are_made_up_and_hostile_ones_are_not_taken_over(http, lines):
    sent = ["", "x" * 65, "a b", '"},{"event":"forged', "caf\u00e9", "../../etc", "<script>"]
    for given in sent:
        http.get("/healthz", headers={"X-Request-ID": given.encode()})
    answer = http.get("/healthz")
    ids = [line["request_id"] for line in lines()]
    assert len(set(ids)) == len(sent) + 1
    assert all(len(made) == 32 and int(made, 16) for made in ids)
    assert answer.headers["X-Request-ID"] == ids[-1]


def test_what_refused_before_its_route_was_looked_for_has_its_name_all_the_same(http, lines):
    assert http.post(ROUTE, json=BODY).status_code == 401
    assert http.get("/v1/%0Aforged").status_code == 401
    assert [(line["route"], line["status"]) for line in lines()] == [(ROUTE, 401), ("other", 401)]


def test_an_act_of_an_administrator_leaves_a_line_of_its_own(http, lines):
    headers = {"Authorization": f"Bearer {ADMIN}", "X-Request-ID": "act"}
    http.post("/v1/admin/bundle", json={"bundle": "tiny@2"}, headers=headers)
    act, request = lines()
    assert (act["logger"], act["event"], act["level"]) == (AUDIT, "change_bundle", "warning")
    assert (act["actor"], act["bundle"], act["request_id"]) == ("ops", "tiny@2", "act")
    assert "the one bundle it was started with" in act["outcome"]
    assert request["request_id"] == "act"


def test_neither_prompts_nor_tokens_are_logged(http, lines, tmp_path):
    full = {**BODY, "negative_prompt": NEGATIVE}
    for fields, headers in (
        ({}, HEADERS),
        ({"stream": True, "partial_images": 1}, HEADERS),
        ({"weights": {PROMPT: 1.0}}, HEADERS),
        ({"prompt": PROMPT * 100}, HEADERS),
        ({"size": PROMPT}, HEADERS),
        ({PROMPT: 1}, HEADERS),
        ({"method": PROMPT}, HEADERS),
        ({"model": PROMPT}, HEADERS),
        ({}, {"Authorization": f"Bearer {TOKEN}x"}),
        ({}, {"Authorization": f"Basic {TOKEN}"}),
    ):
        http.post(ROUTE, json={**full, **fields}, headers=headers)
    http.post(f"{ROUTE}?token={TOKEN}", content=json.dumps(full), headers=HEADERS)
    assert len(lines()) > 10
    text = (tmp_path / "log.jsonl").read_text()
    for secret in (PROMPT, NEGATIVE, TOKEN, ADMIN, "zeppelin"):
        assert secret not in text


def test_a_stream_is_told_by_how_it_ended(lines):
    assert asyncio.run(_streamed(Refusal(status=503, message="lost", type="unavailable_error"))) == 503
    assert asyncio.run(_streamed(None)) == 499
    assert [line["status"] for line in lines() if line["event"] == "request"] == [503, 499]


async def _streamed(last: Refusal | None) -> int:
    """The status that the metrics hear of, when a stream ends in `last` or (None) the client leaves it."""
    told: list[int] = []
    begun = asyncio.Event()

    class Told(Metrics):
        def request(self, *, route: str, status: int, seconds: float) -> None:
            told.append(status)

    class Backend:
        async def stream(self, request, caller):
            yield ProgressEvent(step=0, total=3)
            if last is not None:
                yield last
            await asyncio.sleep(60)

    messages = [{"type": "http.request", "body": json.dumps({**BODY, "stream": True}).encode()}]

    async def receive():
        if messages:
            return messages.pop()
        await begun.wait()
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            begun.set()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": ROUTE, "raw_path": b"", "query_string": b"", "headers": headers}
    await create_http(Backend(), metrics=Told())({**scope, "http_version": "1.1", "root_path": ""}, receive, send)
    return told[0]


def test_the_file_lies_beside_the_one_that_serve_keeps(tmp_path, lines, monkeypatch):
    serves = logging.FileHandler(tmp_path / "replica_app_Engine_ab12.log")
    buffered = MemoryHandler(1, target=serves)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [buffered])
    log_as_json()
    audit("change_bundle", bundle="x@1")
    [line] = (tmp_path / "replica_app_Engine_ab12.jsonl").read_text().splitlines()
    assert json.loads(line)["bundle"] == "x@1"
    buffered.close()
    serves.close()


def test_without_serve_it_is_stderr(lines, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [logging.StreamHandler()])
    log_as_json()
    logging.getLogger("workers.somewhere").info("here")
    assert json.loads(capsys.readouterr().err)["event"] == "here"
