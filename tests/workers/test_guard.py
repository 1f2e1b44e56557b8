"""What every request passes: caps, tokens, headers of the answer, request ids and the log line."""

import logging

import pytest
from endpoints import ROUTE, token_file
from fastapi.testclient import TestClient

from workers.guard import MAX_HEADER_BYTES, SECURITY_HEADERS
from workers.metrics import Metrics
from workers.routes import create_http
from workers.tokens import Tokens

BASE = {"prompt": "a red car", "weights": {"warm": 1.0}, "num_inference_steps": 1}
USER, ADMIN = {"Authorization": "Bearer user"}, {"Authorization": "bearer admin"}


class Noted(Metrics):
    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.running: list[int] = []

    def request(self, *, route: str, status: int, seconds: float) -> None:
        self.requests.append((route, status))

    def in_flight(self, count: int) -> None:
        self.running.append(count)


@pytest.fixture
def noted():
    return Noted()


@pytest.fixture
def guarded(service, noted, tmp_path):
    tokens = Tokens(token_file(tmp_path / "tokens", ann=("images", "user"), ops=("admin", "admin")))
    with TestClient(create_http(service, tokens=tokens, metrics=noted)) as client:
        yield client


def test_images_need_a_token_and_probes_and_the_page_do_not(guarded):
    for path in ("/", "/page/page.css", "/healthz", "/readyz", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path
    for headers in ({}, {"Authorization": "Basic user"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer no"}):
        refused = guarded.post(ROUTE, json=BASE, headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"
        assert guarded.get("/v1/models", headers=headers).status_code == 401
    assert guarded.post(ROUTE, json=BASE, headers=USER).status_code == 200


def test_scopes_are_separate(guarded, client):
    change = {"bundle": "sprites@1"}
    assert guarded.post("/v1/admin/bundle", json=change, headers=USER).status_code == 403
    assert guarded.post(ROUTE, json=BASE, headers=ADMIN).status_code == 403
    assert guarded.post("/v1/admin/bundle", json=change, headers=ADMIN).status_code == 409
    assert client.post("/v1/admin/bundle", json=change).status_code == 403, "without tokens no one is an administrator"


def test_tokens_are_asked_for_under_a_route_prefix_too(service, tmp_path):
    tokens = Tokens(token_file(tmp_path / "tokens", ann=("images", "user")))
    with TestClient(create_http(service, tokens=tokens), root_path="/images") as client:
        assert client.get("/images/healthz").status_code == 200
        assert client.get("/images/v1/models").status_code == 401
        assert client.get("/images/v1/models", headers=USER).status_code == 200
        change = {"bundle": "sprites@1"}
        assert client.post("/images/v1/admin/bundle", json=change).status_code == 401
        assert client.post("/images/v1/admin/bundle", json=change, headers=USER).status_code == 403


@pytest.mark.parametrize("bundle", ["https://example.com/x", "../../etc", "file:///tmp", "", 7, None])
def test_a_bundle_is_named_and_never_a_url_or_a_path(guarded, bundle):
    refused = guarded.post("/v1/admin/bundle", json={"bundle": bundle}, headers=ADMIN)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "bundle"


def test_an_act_of_an_administrator_leaves_a_line(guarded, caplog):
    with caplog.at_level(logging.WARNING, "diffusion_blend.audit"):
        guarded.post("/v1/admin/bundle", json={"bundle": "sprites@1"}, headers={**ADMIN, "X-Request-ID": "r-1"})
    [line] = [record for record in caplog.records if record.name == "diffusion_blend.audit"]
    assert line.facts["actor"] == "ops"
    assert (line.facts["bundle"], line.facts["request_id"]) == ("sprites@1", "r-1")


def test_every_answer_carries_the_security_headers_and_an_id(guarded):
    for answer in (guarded.get("/"), guarded.get("/nothing"), guarded.post(ROUTE, json=BASE), guarded.get("/healthz")):
        assert {name: answer.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert len(answer.headers["x-request-id"]) == 32
    policy = guarded.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


def test_a_request_keeps_the_id_it_came_with_unless_that_could_harm_a_log(guarded):
    assert guarded.get("/healthz", headers={"X-Request-ID": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for hostile in ("a b", 'x"y', "z" * 65, "<script>"):
        assert guarded.get("/healthz", headers={"X-Request-ID": hostile}).headers["x-request-id"] != hostile


def test_headers_are_bounded(guarded):
    large = guarded.get("/healthz", headers={"X-Large": "x" * MAX_HEADER_BYTES})
    assert large.status_code == 431
    many = guarded.get("/healthz", headers={f"X-{number}": "x" for number in range(120)})
    assert many.status_code == 431
    assert "at most" in many.json()["error"]["message"]


def test_requests_at_once_are_bounded_and_probes_still_answer(service):
    with TestClient(create_http(service, max_concurrent=0)) as client:
        full = client.post(ROUTE, json=BASE)
        assert full.status_code == 429
        assert full.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200


def test_metrics_name_routes_and_never_what_a_client_made_up(guarded, noted):
    guarded.get("/healthz")
    guarded.get("/made/up/by/the/client")
    guarded.get("/page/none.js")
    guarded.post(ROUTE, json=BASE)
    assert noted.requests == [("/healthz", 200), ("other", 404), ("/page/{name}", 404), (ROUTE, 401)]
    assert noted.running[-1] == 0


def test_a_defect_is_a_500_without_its_cause(service, monkeypatch, caplog):
    async def broken(*arguments):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service, "generate", broken)
    with TestClient(create_http(service)) as client:
        answer = client.post(ROUTE, json=BASE)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "content-security-policy" in answer.headers
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("path", ["/page/..%2froutes.py", "/page/../routes.py", "/page/__init__.py", "/page/"])
def test_only_files_of_the_page_are_sent(guarded, path):
    assert guarded.get(path).status_code == 404


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "1e9"])
def test_a_deadline_that_is_none_is_told(guarded, seconds):
    refused = guarded.post(ROUTE, json=BASE, headers={**USER, "X-Request-Timeout": seconds})
    assert refused.status_code == 400
    assert "X-Request-Timeout" in refused.json()["error"]["message"]
