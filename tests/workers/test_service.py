"""The routes over a real engine in this process: answers, refusals, admission, aborts and faults."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from blend.footprint import row_bytes
from blend.preference import METHODS
from workers.api import MAX_BODY_BYTES, GenerationRequest
from workers.engine_args import EngineArgs
from workers.generation import forecast, generate_png, plan, request_of
from workers.images import read_facts
from workers.loading import open_engine, pin
from workers.routes import create_http
from workers.service import GenerationService

ROUTE = "/v1/images/generations"
BASE = {
    "prompt": "a red car",
    "weights": {"warm": 0.25, "small": 0.75},
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
}


def ask(client, **fields):
    return client.post(ROUTE, json={**BASE, **fields})


def pngs(answer) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def same_image(png: bytes, other: bytes) -> bool:
    """Equal facts and pixels; a forward of another size may round a pixel to the next value."""
    near = np.abs(pixels(png).astype(int) - pixels(other).astype(int)).max() <= 1
    return near and read_facts(png) == read_facts(other)


def test_an_answer_says_what_made_it(client, opened):
    answer = ask(client, seed=5, n=2)
    made = answer.json()
    assert [item["seed"] for item in made["data"]] == [5, 6]
    assert made["weights"] == {"warm": 0.25, "small": 0.75}
    assert (made["kl_lambda"], made["method"]) == (1.0, "mpa")
    assert made["bundle"] == opened.card.bundle.model_dump()
    # 2 images x 3 steps x 2 adapters x (with and without the prompt)
    assert (made["usage"]["rows"], made["usage"]["steps"]) == (24, 3)
    assert all(made["usage"][key] >= 0 for key in ("queue_ms", "denoise_ms", "decode_ms"))
    width, height = map(int, opened.card.defaults.size.split("x"))
    assert all(pixels(png).shape == (height, width, 3) for png in pngs(answer))


def test_the_endpoint_and_the_command_line_make_the_same_image(client, engine_args):
    fresh = open_engine(engine_args)
    [here] = generate_png(plan(GenerationRequest(**BASE, seed=5), fresh), fresh)
    [there] = pngs(ask(client, seed=5))
    assert np.array_equal(pixels(here), pixels(there))
    assert read_facts(here) == read_facts(there)


def test_several_images_are_those_of_their_seeds(client):
    together = pngs(ask(client, seed=11, n=3))
    alone = [pngs(ask(client, seed=seed))[0] for seed in (11, 12, 13)]
    assert all(same_image(png, other) for png, other in zip(together, alone, strict=True))
    assert not same_image(together[0], together[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"kl_lambda": 0.3, "method": "ls", "seed": 1},
        {"kl_lambda": 1.7, "method": "soup", "guidance_scale": 1.0, "negative_prompt": "grey é"},
        {"size": "TALL", "num_inference_steps": 2},
        {"weights": {"warm": 1.0}},
        {"weights": {"warm": 3, "small": 1}, "normalize": True},
    ],
)
def test_an_image_is_made_again_from_itself(client, opened, fields):
    if fields.get("size") == "TALL":
        multiple, largest = opened.card.limits.size_multiple, opened.card.limits.max_size
        fields = {**fields, "size": f"{multiple}x{largest}"}
    [png] = pngs(ask(client, **fields))
    facts = read_facts(png)
    assert facts.bundle_digest == client.get("/v1/models").json()["data"][0]["bundle"]["digest"]
    again = client.post(
        ROUTE, content=request_of(facts).model_dump_json(), headers={"Content-Type": "application/json"}
    )
    assert pngs(again) == [png]


def test_a_missing_seed_is_drawn_and_told(client):
    seeds = [ask(client).json()["data"][0]["seed"] for _ in range(3)]
    assert len(set(seeds)) == 3


def test_weights_are_normalised_only_when_asked(client):
    made = ask(client, weights={"warm": 3, "small": 1}, normalize=True).json()
    assert made["weights"] == {"warm": 0.75, "small": 0.25}
    assert ask(client, weights={"warm": 3, "small": 1}).json()["error"]["param"] == "weights"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"weights": {"foo": 1.0}}, "weights.foo", ["foo", "warm", "small"]),
        ({"weights": {"warm": -0.5, "small": 1.5}}, "weights.warm", ["-0.5"]),
        ({"weights": {"warm": 0, "small": 0}}, "weights", ["zero"]),
        ({"weights": {"warm": 0.5, "small": 0.4}}, "weights", ["0.9", "1"]),
        ({"weights": {}}, "weights", ["warm", "small"]),
        ({"weights": None}, "weights", ["warm", "required"]),
        ({"weights": {"warm": 1e308, "small": 1.7e308}, "normalize": True}, "weights", ["sum"]),
        ({"kl_lambda": 3.5}, "kl_lambda", ["3.5", "3"]),
        ({"kl_lambda": -0.1}, "kl_lambda", ["-0.1"]),
        ({"kl_lambda": 1.5, "method": "ls"}, "kl_lambda", ["1.5", "ls"]),
        ({"method": "magic"}, "method", ["magic", *METHODS]),
        ({"size": "1x1"}, "size", ["1x1", "multiple"]),
        ({"size": "0x0"}, "size", ["0x0", "multiple"]),
        ({"size": "99968x64"}, "size", ["multiple"]),
        ({"prompt": "word " * 399}, "prompt", ["tokens"]),
        ({"negative_prompt": "word " * 399}, "negative_prompt", ["tokens"]),
        ({"seed": 2**53 - 1, "n": 2}, "seed", ["n = 2"]),
        ({"n": 9}, "n", ["8"]),
        ({"partial_images": 2}, "partial_images", ["stream"]),
    ],
)
def test_what_this_bundle_cannot_serve_is_a_400_that_names_the_field(client, fields, param, words):
    answer = ask(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert all(word in error["message"] for word in words), error["message"]
    assert set(error) == {"message", "type", "param"}


def test_an_image_too_large_for_the_memory_is_a_400_with_the_numbers(engine_args, caplog):
    model = (opened := open_engine(engine_args)).engine.model
    side = opened.card.limits.max_size // 2
    fits, does_not = (
        row_bytes(opened.engine.bank, model.latents_shape(height, side), model.encode_prompts([""]))
        for height in (side, 2 * side)
    )
    memory = (fits + does_not) / 2
    opened = open_engine(engine_args.model_copy(update={"memory_gb": memory / 1e9}))
    service = GenerationService(opened, max_queue_s=10.0)
    try:
        service.warm_up()
        with TestClient(create_http(service)) as client:
            assert pngs(ask(client, size=f"{side}x{side}"))
            answer = ask(client, size=f"{side}x{2 * side}")
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["type"]) == (400, "size", "invalid_request_error")
            numbers = f"takes {does_not / 1e6:.2f} MB while it runs and there are {memory / 1e6:.2f} MB"
            assert f"size: height is {2 * side}" in error["message"]
            assert numbers in error["message"]
            assert client.get("/readyz").status_code == 200
    finally:
        service.close()
    assert not caplog.records


@pytest.mark.parametrize("memory_gb", [0, -1, float("nan"), float("inf")])
def test_impossible_memory_is_refused(memory_gb):
    with pytest.raises(ValidationError, match="memory_gb"):
        EngineArgs(memory_gb=memory_gb)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kl_lambda", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("weights", [{"warm": 1.0}, {"warm": 0.5, "small": 0.5}])
def test_the_rows_of_a_request_are_foretold(client, opened, weights, kl_lambda, method, guidance_scale):
    fields = {**BASE, "weights": weights, "kl_lambda": kl_lambda, "method": method, "guidance_scale": guidance_scale}
    [sample] = plan(GenerationRequest(**fields), opened)
    assert client.post(ROUTE, json=fields).json()["usage"]["rows"] == forecast([sample], opened.basis).rows


def test_names_of_models_are_checked(client, opened):
    assert ask(client, model=opened.card.id).status_code == 200
    answer = ask(client, model="dall-e-3")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    assert opened.card.id in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "status"),
    [
        ("POST", ROUTE, b"{", "application/json", 400),
        ("POST", ROUTE, b'{"prompt": NaN}', "application/json", 400),
        ("POST", ROUTE, b'{"prompt": "x", "weights": {"warm": NaN}}', "application/json; charset=utf-8", 400),
        ("POST", ROUTE, b'{"prompt": "x"}', "text/plain", 415),
        ("POST", ROUTE, b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
        ("GET", ROUTE, b"", "application/json", 405),
        ("GET", "/v1/nothing", b"", "application/json", 404),
    ],
)
def test_every_refusal_has_the_same_body(client, method, path, content, kind, status):
    answer = client.request(method, path, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param"}


def test_a_body_without_a_length_is_cut_off_too(client):
    def endless():
        for _ in range(40):
            yield b" " * 4096

    answer = client.post(ROUTE, content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_the_models_route_lists_what_a_client_needs(client):
    [card] = client.get("/v1/models").json()["data"]
    assert [adapter["name"] for adapter in card["basis"]] == ["warm", "small"]
    assert card["methods"] == list(METHODS)
    assert card["kl_lambda_range"] == [0.0, 3.0]
    assert card["defaults"]["weights"] is None
    assert card["limits"]["max_images"] == 8
    assert str(card).count("/") == 0, "paths of the server are nobody's business"


def test_the_openapi_document_describes_the_request(client):
    operation = client.get("/openapi.json").json()["paths"][ROUTE]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(GenerationRequest.model_fields)
    assert schema["additionalProperties"] is False
    assert {"200", "400", "404", "413", "429", "503"} <= set(operation["responses"])


def test_health_and_readiness(client, opened):
    assert client.get("/healthz").json()["status"] == "up"
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["bundle"]) == (200, opened.card.bundle.model_dump())


def test_requests_in_one_batch_do_not_touch_each_other(client):
    wishes = [
        {"seed": 1, "kl_lambda": 0.5},
        {"seed": 2, "method": "ls", "num_inference_steps": 5},
        {"seed": 3, "method": "soup", "guidance_scale": 1.0},
        {"seed": 4, "prompt": "a blue dog", "weights": {"small": 1.0}},
        {"seed": 5, "n": 2, "kl_lambda": 1.4},
    ]
    alone = [pngs(ask(client, **wish)) for wish in wishes]
    with ThreadPoolExecutor(len(wishes)) as pool:
        together = list(pool.map(lambda wish: pngs(ask(client, **wish)), wishes))
    for one, other in zip(alone, together, strict=True):
        for png, same in zip(one, other, strict=True):
            assert same_image(png, same)


def test_a_pinned_bundle_still_answers_to_the_name_it_was_asked_by(tiny_store_url):
    pinned = pin(EngineArgs(bundle="tiny@champion", store_url=tiny_store_url))
    assert pinned.bundle == "tiny@1"
    assert pin(pinned) == pinned
    assert open_engine(pinned).card.accepted_names == ["tiny", "tiny@1", "tiny@champion"]
