"""The endpoint's benchmark in small: company changes no image, who leaves is forgotten, nonsense breaks nothing."""

import asyncio
import importlib
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from workers.routes import create_http
from workers.service import GenerationService

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield lambda part: importlib.import_module(f"endpoint_parts.{part}")


@pytest.fixture(scope="module")
def endpoint(bench, cluster, tiny_store_url, tmp_path_factory):
    from ray import serve

    from workers.deploying import check_port

    stage = bench("service").Stage(tmp_path_factory.mktemp("stage"), check_port("127.0.0.1", 0))
    yield stage.serve(
        bundle="tiny@champion", store_url=tiny_store_url, deterministic=True, tile_rows=8, max_queue_s=600.0
    )
    serve.shutdown()


@pytest.mark.long
def test_images_made_in_company_are_those_made_alone_bit_by_bit(bench, endpoint):
    outcome = bench("equality").run(endpoint, 12, steps=(2, 5))
    assert outcome.complaints() == []
    assert outcome.figures["images"] >= len(outcome.answers) == 12
    assert (outcome.figures["mismatches"], outcome.figures["largest_difference"]) == (0, 0)


@pytest.mark.long
def test_clients_that_leave_leave_nothing_behind(bench, endpoint):
    outcome = bench("disconnects").run(endpoint, 10)
    assert outcome.complaints() == []
    assert outcome.figures["disconnects_leaked"] == 0
    assert outcome.figures["aborted"] + outcome.figures["finished"] == 10
    assert outcome.figures["aborted"] >= 8


@pytest.mark.long
def test_all_processes_of_the_endpoint_are_watched(bench, endpoint):
    processes = endpoint.processes()
    assert processes.keys() == {"engine", "ingress", "proxy"}
    assert processes["engine"].pid == endpoint.figures()["pid"]


def test_an_image_that_differs_is_counted(bench, opened):
    """Both of another image's pixels, and of the same pixels under other facts."""
    from workers.api import GenerationRequest
    from workers.generation import generate_png, plan
    from workers.images import encode_png, read_facts

    equality = bench("equality")
    request = GenerationRequest(prompt="x", weights={"warm": 1.0}, num_inference_steps=1, seed=1)
    [png] = generate_png(plan(request, opened), opened)
    other = encode_png(255 - equality._levels(png).astype("uint8"), read_facts(png))
    assert equality.compare([png], opened)["mismatches"] == 0
    figures = equality.compare([png, other], opened)
    assert figures["mismatches"] == 1
    assert figures["largest_difference"] > 1


def test_overload_is_answered_or_put_off_in_numbers(bench, opened):
    """The same judgement as over HTTP, of an engine in this process that gets far more than it can do."""
    traffic, overload = bench("traffic"), bench("overload")
    service = GenerationService(opened, max_queue_s=0.5)
    service.warm_up()
    try:
        ask = bench("rivals").in_process(service)
        mix = traffic.Mix(opened.card, "overload", streamed=0.0)
        answers = asyncio.run(traffic.open_loop(ask, map(mix.request, count()), rate=100.0, seconds=1.5))
    finally:
        service.close()
    figures = overload.judge(answers, 0.5)
    assert figures["sent"] == len(answers) > 100
    assert figures["statuses"].keys() == {"200", "429"}
    assert figures["bare_429"] == 0
    assert figures["queue_p99_s"] > 0
    assert figures["share_429"] > 0.3


def test_broken_promises_of_overload_are_told(bench):
    overload, answer = bench("overload"), bench("traffic").Answer
    usage = {"queue_ms": 9_000.0, "rows": 4}
    answers = [
        answer(200, 10.0, "ann", usage=usage),
        answer(429, 0.1, "ann", retry_after="3", message="the queue is full"),
        answer(503, 0.1, "ben"),
    ]
    wrong = overload.faults(overload.judge(answers, 5.0), left=2)
    assert [words.split()[0] for words in wrong] == ["1", "1", "p99", "2"]


def test_growing_memory_has_a_slope(bench):
    import numpy as np

    minutes = np.arange(20) / 60
    assert bench("memory").slope(minutes, 100 + 3 * minutes) == pytest.approx(3.0)
    with bench("memory").MemoryWatch({}, every_s=0.01), pytest.raises(RuntimeError, match="too few"):
        bench("memory").MemoryWatch({}).figures()


def test_rivals_are_compared_round_by_round(bench):
    rivals, answer = bench("rivals"), bench("traffic").Answer
    usage = {"rows": 10, "queue_ms": 1.0, "denoise_ms": 900.0, "decode_ms": 9.0}
    times = {rivals.OURS: [1.0, 2.0, 1.0], "serial": [2.0, 6.0, 4.0]}
    figures = rivals.summarise(times, {name: [answer(200, 1.0, usage=usage)] * 12 for name in times})
    assert figures["ratio_vs_serial"]["median"] == 3.0
    assert figures["in_flight"]["requests_per_s"] == 3.0
    assert figures["serial"]["outside_engine_p50_ms"] == pytest.approx(90.0)


def test_cases_from_the_description_break_nothing(bench, service):
    import schemathesis

    fuzz = bench("fuzz")
    fuzzer = fuzz.Fuzzer()
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_http(service))
    fuzz.send_schema_cases(fuzzer, schema, 40)
    outcome = fuzzer.outcome()
    assert outcome.complaints() == []
    assert outcome.figures["fuzz_cases"] >= 30


def test_hostile_bodies_break_nothing(bench, client, opened):
    fuzz = bench("fuzz")
    fuzzer = fuzz.Fuzzer()
    fuzz.send_hostile(fuzzer, client.post, list(opened.basis), 60)
    fuzz.send_oddities(fuzzer, client.request)
    outcome = fuzzer.outcome()
    assert outcome.complaints() == []
    assert outcome.figures["statuses"].keys() >= {"200", "400", "404", "405", "413", "415", "431"}


def test_a_service_that_fails_or_says_what_it_should_not_is_found_out(bench):
    import schemathesis
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    from workers.api import Health

    app = FastAPI()

    @app.get("/failing", response_model=Health)
    def failing():
        return JSONResponse({}, status_code=500)

    @app.get("/lying", response_model=Health)
    def lying():
        return JSONResponse({"status": 7})

    fuzz = bench("fuzz")
    fuzzer = fuzz.Fuzzer()
    fuzz.send_schema_cases(fuzzer, schemathesis.openapi.from_asgi("/openapi.json", app), 2)
    fuzz.send_hostile(fuzzer, TestClient(app).post, ["warm"], 3)
    outcome = fuzzer.outcome()
    assert outcome.errors_5xx >= 1
    assert any("JsonSchemaError" in words for words in outcome.wrong)
    assert any("without message" in words for words in outcome.wrong)


def test_every_quoted_figure_is_found_where_it_stands(bench):
    endpoint = importlib.import_module("endpoint")
    parts = {
        "overload": {"rss_slope_mb_per_min": 0.1, "p50_ms": 1.0, "p99_ms": 2.0},
        "rivals": {f"ratio_vs_{name}": {"median": 2.0} for name in ("serial", "serve_batch")},
        "disconnects": {"disconnects_leaked": 0},
    }
    found = endpoint.headline(parts)
    assert (found["p99_ms"], found["ratio_vs_serve_batch"], found["disconnects_leaked"]) == (2.0, 2.0, 0)
    assert found["mismatches"] is None
    assert SimpleNamespace(**found).fuzz_cases is None
