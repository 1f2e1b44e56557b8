"""Requests that no sane client sends: cases made from the endpoint's own description, and hostile bodies."""

import time
from collections.abc import Callable
from typing import Any

import hypothesis
import schemathesis
from endpoint_parts.hostile import ODDITIES, bodies
from endpoint_parts.outcome import Outcome, by_status
from endpoint_parts.traffic import NO_ANSWER, ROUTE, Answer
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# a case may come out as a valid request for much work; it is not waited for
TIMEOUT_S = 60.0
LIMIT_S = 300.0
SEED = 20260101


class Fuzzer:
    """Sends cases and keeps what came back; stops sending after LIMIT_S."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.broken: dict[str, str] = {}  # what was promised otherwise -> the first case
        self._until = time.monotonic() + LIMIT_S

    def send(self, what: str, call: Callable[[], Any], check: Callable[[Any], None]) -> None:
        if time.monotonic() > self._until:
            return
        began = time.perf_counter()
        try:
            reply = call()
        except Exception as error:
            # any failure of the client's library to get an answer is the finding
            self.answers.append(Answer(NO_ANSWER, time.perf_counter() - began, message=f"{what}: {error!r}"))
            return
        seconds = time.perf_counter() - began
        self.answers.append(Answer(reply.status_code, seconds, message=f"{what}: {reply.text[:200]}"))
        try:
            check(reply)
        except FailureGroup as group:
            for failure in group.exceptions:
                self._note(failure, what)
        except Failure as failure:
            self._note(failure, what)

    def _note(self, failure: Exception, what: str) -> None:
        title = str(failure).split("\n")[0]
        self.broken.setdefault(f"{type(failure).__name__}: {title}", f"{what[:300]} ({failure})"[:900])

    def outcome(self) -> Outcome:
        figures = {
            "fuzz_cases": len(self.answers),
            "statuses": by_status(self.answers),
            "broken_promises": len(self.broken),
        }
        return Outcome(self.answers, figures, [f"{name} -- {case}" for name, case in self.broken.items()])


def run(url: str, tokens: dict[str, str], admin: str, basis: list[str], *, schema_cases: int, hostile: int) -> Outcome:
    """`schema_cases` by schemathesis from the running /openapi.json, `hostile` bodies by hypothesis."""
    import httpx

    fuzzer = Fuzzer()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    send_schema_cases(fuzzer, schema, schema_cases, headers={"Authorization": f"Bearer {admin}"})
    bearer = {"Authorization": f"Bearer {next(iter(tokens.values()))}"}
    with httpx.Client(base_url=url, headers=bearer, timeout=TIMEOUT_S, trust_env=False) as client:
        send_hostile(fuzzer, client.post, basis, hostile)
        send_oddities(fuzzer, client.request)
    return fuzzer.outcome()


def send_schema_cases(fuzzer: Fuzzer, schema: Any, cases: int, headers: dict[str, str] | None = None) -> None:
    """Valid and invalid cases of every operation, most of them for the operations that take a body."""
    operations = [result.ok() for result in schema.get_all_operations()]
    shares = [8 if operation.body else 1 for operation in operations]
    for operation, share in zip(operations, shares, strict=True):
        modes = [schemathesis.GenerationMode.POSITIVE]
        modes += [schemathesis.GenerationMode.NEGATIVE] if operation.body else []
        for mode in modes:
            number = max(1, round(cases * share / sum(shares) / len(modes)))

            def send(case: Any) -> None:
                def call() -> Any:
                    return case.call(headers=headers, timeout=TIMEOUT_S)

                fuzzer.send(case.as_curl_command()[:400], call, lambda reply: _check(case, reply))

            drive(operation.as_strategy(mode), send, number)


def _check(case: Any, reply: Any) -> None:
    case.validate_response(reply, checks=CHECKS)


def send_hostile(fuzzer: Fuzzer, post: Callable[..., Any], basis: list[str], cases: int) -> None:
    """Bodies for the image route; every refusal must be an error as the description has it."""

    def send(body: bytes) -> None:
        kind = {"Content-Type": "application/json", "X-Request-Timeout": "20"}
        fuzzer.send(repr(body[:300]), lambda: post(ROUTE, content=body, headers=kind), _well_formed)

    drive(bodies(basis), send, cases)


def send_oddities(fuzzer: Fuzzer, request: Callable[..., Any]) -> None:
    """Requests that are odd in method, path or headers."""
    for method, path, headers, body in ODDITIES:
        sent = {name: value.encode("latin-1") for name, value in headers.items()}

        def call(method=method, path=path, sent=sent, body=body) -> Any:
            return request(method, path, headers=sent, content=body)

        fuzzer.send(f"{method} {path[:60]} {str(headers)[:80]}", call, _well_formed)


def _well_formed(reply: Any) -> None:
    if reply.status_code < 400:
        return
    if reply.headers.get("content-type", "").partition(";")[0] != "application/json":
        # what is no HTTP is refused by the proxy's own parser, in its own words
        if reply.status_code < 500:
            return
        raise Failure(operation="hostile", title="a failure that is no JSON", message=reply.text[:200])
    body = reply.json()
    if set(body) != {"error"} or set(body["error"]) != {"message", "type", "param"}:
        raise Failure(operation="hostile", title="an error without message, type and param", message=reply.text[:200])


def drive(strategy: st.SearchStrategy[Any], send: Callable[[Any], None], cases: int) -> None:
    """Hand `cases` examples to `send`, the same ones every time."""

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def each(example: Any) -> None:
        send(example)

    each()
