"""The document at /openapi.json is complete and true, and the official OpenAI client works against the service."""

import base64
import time

import httpx
import openai
import pytest
from endpoints import serve, token_file

from workers.api import ErrorAnswer, GenerationRequest
from workers.events import CompletedEvent
from workers.images import read_facts
from workers.openapi import REFUSALS
from workers.routes import create_http
from workers.tokens import Tokens

FIELDS = {"weights": {"warm": 0.25, "small": 0.75}, "num_inference_steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def document(service):
    return create_http(service).openapi()


@pytest.fixture(scope="module")
def served(service, tmp_path_factory):
    """The service behind a real server on loopback, with tokens."""
    tokens = Tokens(token_file(tmp_path_factory.mktemp("t") / "tokens", ann=("images", "key")))
    with serve(create_http(service, tokens=tokens)) as url:
        yield url


@pytest.fixture
def ai(served):
    return openai.OpenAI(base_url=f"{served}/v1", api_key="key", max_retries=0)


def test_every_route_and_answer_is_described(document):
    assert set(document["paths"]) == {
        "/v1/images/generations", "/v1/models", "/v1/evaluations/latest", "/v1/admin/bundle", "/healthz", "/readyz",
    }  # fmt: skip
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["description"] or operation["summary"], path
            if path.startswith("/v1/"):
                assert {int(status) for status in operation["responses"]} >= set(REFUSALS), path
                assert operation["security"] == [{"token": []}, {}]
            assert "422" not in operation["responses"], "bad input is a 400"


def test_the_request_is_described_field_by_field_with_an_example_that_works(document, client):
    body = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    schema = body["schema"]
    assert set(schema["properties"]) == set(GenerationRequest.model_fields)
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["additionalProperties"] is False
    [example] = schema["examples"]
    answer = client.post("/v1/images/generations", json={**example, **FIELDS})
    assert answer.status_code == 200


def test_examples_of_refusals_are_refusals(document):
    responses = document["paths"]["/v1/images/generations"]["post"]["responses"]
    for status in map(str, REFUSALS):
        ErrorAnswer.model_validate(responses[status]["content"]["application/json"]["example"])
    assert "Retry-After" in responses["429"]["headers"]
    stream = responses["200"]["content"]["text/event-stream"]["example"]
    assert stream.endswith("\n\n")
    assert "CompletedEvent" in document["components"]["schemas"]
    assert "b64_json" in document["components"]["schemas"]["CompletedEvent"]["properties"]


def test_all_references_lead_somewhere(document):
    def references(node):
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "$ref")
            node = list(node.values())
        if isinstance(node, list):
            for inner in node:
                yield from references(inner)

    found = set(references(document))
    assert found
    for reference in found:
        node = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]


def test_the_openai_client_makes_images(ai, opened):
    answer = ai.images.generate(
        model=opened.card.id, prompt="a red car", n=2, response_format="b64_json", extra_body=FIELDS
    )
    assert [image.seed for image in answer.data] == [5, 6]
    assert read_facts(base64.b64decode(answer.data[0].b64_json)).weights == FIELDS["weights"]
    assert answer.usage.rows == 24
    assert answer.bundle["digest"] == opened.card.bundle.digest


def test_the_openai_client_streams(ai):
    events = list(
        ai.images.generate(
            prompt="a red car", stream=True, partial_images=2, response_format="b64_json", extra_body=FIELDS
        )
    )
    kinds = [event.type for event in events]
    assert kinds.count("image_generation.partial_image") == 2
    assert kinds[-1] == "image_generation.completed"
    assert (events[0].type, events[0].step, events[0].total) == ("blend.progress", 0, 3)
    completed = CompletedEvent.model_validate(events[-1].model_dump())
    assert read_facts(base64.b64decode(completed.b64_json)).seed == 5


def test_the_openai_client_raises_its_own_errors(ai, served, service):
    with pytest.raises(openai.BadRequestError, match="foo") as caught:
        ai.images.generate(prompt="a red car", extra_body={"weights": {"foo": 1.0}})
    assert caught.value.param == "weights.foo"
    with pytest.raises(openai.NotFoundError):
        ai.images.generate(prompt="a red car", model="another", extra_body=FIELDS)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_openai_client_lists_the_bundle(ai, opened):
    [model] = ai.models.list().data
    assert model.id == opened.card.id
    assert [basis["name"] for basis in model.basis] == ["warm", "small"]


def test_a_slow_body_and_a_body_of_the_wrong_kind_are_told(served, monkeypatch):
    monkeypatch.setattr("workers.routes.BODY_TIMEOUT_S", 0.2)

    def drip():
        yield b"{"
        time.sleep(1.0)
        yield b"}"

    headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
    late = httpx.post(f"{served}/v1/images/generations", content=drip(), headers=headers)
    assert late.status_code == 408
    assert late.json()["error"]["type"] == "timeout_error"
