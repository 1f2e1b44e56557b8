"""Bodies for the image route that are nearly right, quite wrong or not JSON at all."""

import json
from typing import Any

from hypothesis import strategies as st

HUGE = (10**400, -(10**400), 2**63, 2**64, -(2**63), 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"))
FIELDS = (
    "model",
    "n",
    "size",
    "response_format",
    "stream",
    "partial_images",
    "weights",
    "kl_lambda",
    "method",
    "normalize",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "unheard_of",
)
numbers = st.one_of(st.floats(), st.integers(), st.sampled_from(HUGE))
scalars = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=40))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
# unpaired surrogates too: json.dumps escapes them, so they arrive as text that no UTF-8 can hold
unicode = st.text(alphabet=st.characters(), min_size=0, max_size=60)


JSON = {"Content-Type": "application/json"}
# method, path, headers, body: requests that are odd outside their body
ODDITIES: tuple[tuple[str, str, dict[str, str], bytes], ...] = (
    *((method, "/v1/images/generations", JSON, b"") for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW")),
    *(("POST", path, JSON, b"{}") for path in ("/", "/healthz", "/v1", "/v1/", "/v1/models", "/page/main.js")),
    *(("GET", f"/page/{name}", {}, b"") for name in ("%00", "..%2f..%2fapi.py", "%ff%fe", "x" * 4000, "%252e%252e")),
    *(
        ("GET", path, {}, b"")
        for path in ("//", "/v1//models", "/%2e%2e/", "/V1/models", "/docs", "/openapi.json?x=%00")
    ),
    *(
        ("POST", "/v1/images/generations", {"Content-Type": kind}, b"{}")
        for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "a/b; charset=\xff")
    ),
    ("POST", "/v1/images/generations", JSON, b" " * 70_000),
    ("POST", "/v1/images/generations", JSON | {"Content-Encoding": "gzip"}, b"\x1f\x8b"),
    ("POST", "/v1/images/generations", JSON | {"X-Request-Timeout": "nan"}, b"{}"),
    ("POST", "/v1/images/generations", JSON | {"X-Request-ID": "a b\tc" * 50}, b"{}"),
    ("POST", "/v1/images/generations", JSON | {"Authorization": "Bearer \xe9\xff"}, b"{}"),
    ("GET", "/v1/models", {f"X-Many-{index}": "x" for index in range(150)}, b""),
    ("GET", "/v1/models", {"X-Long": "x" * 20_000}, b""),
    ("GET", "/healthz", {"Range": "bytes=5-1", "If-None-Match": "*", "Accept": "\xff"}, b""),
)


def bodies(basis: list[str]) -> st.SearchStrategy[bytes]:
    """Bytes of one request body; a valid one asks for a step or two."""
    return st.one_of(_near_misses(basis), _valid(basis), _wild_fields(basis), _no_json(basis))


def _near_misses(basis: list[str]) -> st.SearchStrategy[bytes]:
    names = st.sampled_from([*basis, "", "é", "__proto__", "x" * 200])
    weights = st.dictionaries(names, numbers | scalars, max_size=4)
    return _encoded({"prompt": unicode, "weights": weights, "kl_lambda": numbers, "num_inference_steps": st.just(1)})


def _valid(basis: list[str]) -> st.SearchStrategy[bytes]:
    """Everything within its range: these must make images, whatever the prompt's alphabet."""
    return _encoded(
        {
            "prompt": unicode,
            "negative_prompt": unicode,
            "weights": st.sampled_from(basis).map(lambda name: {name: 1.0}),
            "kl_lambda": st.floats(0, 3),
            "guidance_scale": st.floats(0, 50),
            "method": st.sampled_from(("mpa", "ls", "soup", "cached", "staged")),
            "num_inference_steps": st.integers(1, 2),
            "n": st.integers(1, 2),
            "seed": st.integers(0, 2**53),
            "stream": st.booleans(),
        }
    )


def _wild_fields(basis: list[str]) -> st.SearchStrategy[bytes]:
    right: dict[str, Any] = {"prompt": "A red colored car.", "weights": {basis[0]: 1.0}, "num_inference_steps": 1}
    wild = st.dictionaries(st.sampled_from(("prompt", *FIELDS)), anything, min_size=1, max_size=3)
    return wild.map(lambda fields: json.dumps(right | fields).encode())


def _no_json(basis: list[str]) -> st.SearchStrategy[bytes]:
    depths = st.integers(1, 20_000)
    whole = json.dumps({"prompt": "A red colored car.", "weights": {basis[0]: 1.0}, "num_inference_steps": 1}).encode()
    return st.one_of(
        st.binary(max_size=200),
        depths.map(lambda depth: b'{"weights":' * (depth // 4)),
        depths.map(lambda depth: b'{"prompt": "x", "weights": ' + b"[" * depth + b"]" * depth + b"}"),
        depths.map(lambda digits: b'{"prompt": "x", "kl_lambda": ' + b"9" * digits + b"}"),
        depths.map(lambda digits: b'{"prompt": "x", "seed": 1e' + b"9" * digits + b"}"),
        st.integers(0, len(whole) - 1).map(lambda end: whole[:end]),
        st.integers(0, len(whole) - 1).map(lambda at: whole[:at] + b"\xff" + whole[at:]),
        st.just(whole[:-1] + b', "prompt": 1}'),
        st.just(b'{"prompt": "\\ud800", "weights": {"\\udfff": 1}}'),
        st.just(b'{"prompt": "\\u0000", "weights": {"' + basis[0].encode() + b'": 1}, "num_inference_steps": 1}'),
    )


def _encoded(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries(fields).map(lambda body: json.dumps(body).encode())
