"""The endpoint's figures on the Prometheus page of a real Ray cluster, as a scraper reads them."""

import json
import re

import httpx
import pytest
import ray
from endpoints import ROUTE
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_for

from workers import ray_metrics
from workers.generation import Opened
from workers.loading import open_engine
from workers.ray_metrics import DECLARED, PREFIX, RayMetrics
from workers.routes import create_http
from workers.service import GenerationService
from workers.whereabouts import log_files, metrics_pages

pytestmark = pytest.mark.slow

BASE = {"prompt": "a red car", "weights": {"warm": 0.25, "small": 0.75}, "num_inference_steps": 3}
OF_ALL = f"ray_{PREFIX}_"


class Page:
    """One reading: values of this process, by name and by the labels that are ours."""

    def __init__(self, text: str) -> None:
        labels = {"le", *(label for declared in DECLARED.values() for label in declared.labels)}
        self.kinds: dict[str, str] = {}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            self.kinds[family.name.removeprefix(OF_ALL)] = family.type
            for sample in family.samples:
                if sample.labels.get("WorkerId") != ray.get_runtime_context().get_worker_id():
                    continue
                ours = frozenset((key, value) for key, value in sample.labels.items() if key in labels)
                self.values[sample.name.removeprefix(OF_ALL), ours] = sample.value

    def get(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))


@pytest.fixture(scope="module")
def page(cluster, engine_args):
    """What is exported after some requests, by a service in this process: a Ray process as good as any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_metrics, "REPEAT_S", 0.5)
        metrics = RayMetrics()
        opened = open_engine(engine_args)
        metrics.serving(name="old", version=1, digest="00")
        metrics.serving(**opened.card.bundle.model_dump())
        service = GenerationService(opened, max_queue_s=10.0, metrics=metrics)
        with TestClient(create_http(service, metrics=metrics)) as client:
            _traffic(client, opened)
        yield _read(lambda page: page.get("requests_total", route="other", status="404"))
        service.close()


def _traffic(client: TestClient, opened: Opened) -> None:
    def ask(**fields):
        return client.post(ROUTE, json={**BASE, **fields}).status_code

    assert [ask(), ask(n=2, method="soup"), ask(stream=True)] == [200, 200, 200]
    assert ask(weights={"foo": 1.0}) == 400
    for path in ("/invented", "/also/invented?x=1", "/v1/invented"):
        assert client.get(path).status_code == 404


def _read(ready) -> Page:
    [url] = metrics_pages()

    def page() -> Page | None:
        found = Page(httpx.get(url, timeout=30).text)
        return found if ready(found) else None

    return wait_for(page, "what is to be on the page", 0.5)


def test_everything_declared_arrives_under_its_name(page):
    kinds = {name: page.kinds.get(name) for name in DECLARED}
    assert kinds == {name: declared.kind.__name__.lower() for name, declared in DECLARED.items()}


def test_names_have_the_units_that_prometheus_asks_for(page):
    for name, declared in DECLARED.items():
        assert re.fullmatch(r"[a-z_]+", name)
        if declared.boundaries:
            assert name.endswith(("_seconds", "_ratio"))
            assert list(declared.boundaries) == sorted(set(declared.boundaries))


def test_requests_are_counted_by_how_they_ended(page):
    assert page.get("requests_total", route=ROUTE, status="200") == 3
    assert page.get("requests_total", route=ROUTE, status="400") == 1
    assert page.get("request_seconds_count", route=ROUTE, status="200") == 3
    assert page.get("requests_in_flight") == 0


def test_a_client_cannot_invent_a_label(page):
    assert page.get("requests_total", route="other", status="404") == 3
    assert "invented" not in json.dumps([sorted(labels) for _, labels in page.values])


def test_work_is_counted_by_method(page):
    # 3 and 1 images of mpa and soup, in 3 steps of 4 rows (2 adapters, guided) and 2 rows
    assert page.get("answers_total", method="mpa") == 2
    assert page.get("images_total", method="soup") == 2
    assert page.get("rows_total") == 2 * 3 * 4 + 2 * 3 * 2
    assert page.get("step_seconds_count") == page.get("batch_occupancy_ratio_count") > 0
    assert page.get("queue_seconds_count") == 3
    assert page.get("queue_seconds_bucket", le="+Inf") == 3
    assert page.get("backlog_seconds") == 0


def test_the_bundle_that_is_served_is_the_only_one_at_1(page, opened):
    served = [(dict(labels)["digest"], value) for (name, labels), value in page.values.items() if name == "bundle_info"]
    assert [digest for digest, value in served if value == 1] == [opened.card.bundle.digest]


def test_the_log_files_have_a_place(cluster):
    assert re.search(r"/session_[^/]+/logs/serve/\*\.jsonl\*$", log_files())
