"""What a request can be refused for before any model is asked: every message names its field."""

import json
import pickle
import subprocess
import sys

import pytest

from workers.api import MAX_SEED, GenerationRequest, RequestError, check_fields, read_request


def refusal(body: bytes):
    with pytest.raises(RequestError) as caught:
        read_request(body)
    return caught.value.refusal


def body(**fields: object) -> bytes:
    return json.dumps({"prompt": "A red colored car.", **fields}).encode()


def test_a_full_request_is_read_field_by_field():
    fields = {
        "prompt": "A blue cup and a green cell phone.",
        "model": "sprites",
        "n": 3,
        "size": "64x32",
        "response_format": "b64_json",
        "stream": False,
        "partial_images": 0,
        "weights": {"a": 0.25, "b": 0.75},
        "kl_lambda": 1,
        "method": "mpa",
        "normalize": True,
        "negative_prompt": "grey",
        "num_inference_steps": 12,
        "guidance_scale": 2.5,
        "seed": 9,
    }
    request = read_request(json.dumps(fields).encode())
    assert request.model_dump() == fields
    assert set(fields) == set(GenerationRequest.model_fields)


def test_everything_but_the_prompt_has_a_default():
    request = read_request(b'{"prompt": "x"}')
    assert (request.n, request.normalize, request.seed, request.weights) == (1, False, None, None)


@pytest.mark.parametrize(
    ("text", "param"),
    [
        (b'{"prompt": "x", "weights": {"foo": NaN}}', "weights.foo"),
        (b'{"prompt": "x", "weights": {"foo": Infinity}}', "weights.foo"),
        (b'{"prompt": "x", "weights": {"foo": 1e999}}', "weights.foo"),
        (b'{"prompt": "x", "kl_lambda": NaN}', "kl_lambda"),
        (b'{"prompt": "x", "guidance_scale": -Infinity}', "guidance_scale"),
        (body(weights={"foo": "0.5"}), "weights.foo"),
        (body(weights={"foo": True}), "weights.foo"),
        (body(weights={"foo": None}), "weights.foo"),
        (body(weights=[1]), "weights"),
        (body(weights={f"b{i}": 0 for i in range(65)}), "weights"),
        (body(kl_lambda="1"), "kl_lambda"),
        (body(n=0), "n"),
        (body(n=9), "n"),
        (body(n=1.5), "n"),
        (body(n=True), "n"),
        (body(size="big"), "size"),
        (body(size="64x64\n"), "size"),
        (body(size=64), "size"),
        (body(num_inference_steps=0), "num_inference_steps"),
        (body(num_inference_steps=201), "num_inference_steps"),
        (body(guidance_scale=-1), "guidance_scale"),
        (body(guidance_scale=51), "guidance_scale"),
        (body(seed=-1), "seed"),
        (body(seed=MAX_SEED + 1), "seed"),
        (body(seed=10**400), "seed"),
        (body(prompt=""), "prompt"),
        (body(prompt=" \n"), "prompt"),
        (body(prompt="x" * 2001), "prompt"),
        (body(prompt=None), "prompt"),
        (body(negative_prompt="x" * 2001), "negative_prompt"),
        (body(response_format="url"), "response_format"),
        (body(stream=1), "stream"),
        (body(partial_images=1), "partial_images"),
        (body(stream=True, partial_images=11), "partial_images"),
        (body(method=3), "method"),
        (body(model=""), "model"),
        (body(lora_scale=1), "lora_scale"),
        (b"{}", "prompt"),
    ],
)
def test_each_bad_value_names_its_field(text, param):
    found = refusal(text)
    assert (found.status, found.type, found.param) == (400, "invalid_request_error", param)
    assert param.split(".")[-1] in found.message
    assert found.body() == {"error": {"message": found.message, "type": "invalid_request_error", "param": param}}


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b'"x"', b"null", b'{"prompt": "\\ud800"}', b"\xff\xfe", b"{'a': 1}"]
)
def test_what_is_no_json_object_is_refused_without_a_field(text):
    found = refusal(text)
    assert found.status == 400
    assert found.param is None


def test_messages_tell_the_allowed_values_and_stay_short():
    assert "allowed fields: prompt, model" in refusal(body(steps=3)).message
    assert '"b64_json"' in refusal(body(response_format="url")).message
    assert "WIDTHxHEIGHT" in refusal(body(size="64")).message
    assert "stream" in refusal(body(partial_images=1)).message
    assert len(refusal(body(size="x" * 5000)).message) < 300
    assert len(refusal(body(**{"y" * 5000: 1})).message) < 800


def test_the_command_line_is_judged_by_the_same_rules():
    assert check_fields({"prompt": "x", "weights": {"a": 1.0}}).weights == {"a": 1.0}
    with pytest.raises(RequestError) as caught:
        check_fields({"prompt": "x", "kl_lambda": float("nan")})
    assert caught.value.refusal.param == "kl_lambda"


def test_a_request_error_survives_pickle():
    with pytest.raises(RequestError) as caught:
        read_request(b"{")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.refusal == caught.value.refusal
    assert str(copy) == str(caught.value)


def test_the_ingress_needs_no_torch():
    code = "import sys, workers.serving; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
