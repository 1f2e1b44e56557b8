"""What the tests of the page share: the shipped bundle served in this process, and a real browser before it.

A plugin: name it in `pytest_plugins` of a test module.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from endpoints import serve
from waiting import PATIENCE_S, wait_for

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def page_service(tmp_path_factory):
    """The shipped bundle in a store of its own, loaded."""
    import shutil

    from blend.sprites import REGISTRY_PATH
    from workers.engine_args import EngineArgs
    from workers.loading import open_engine
    from workers.service import GenerationService

    store = tmp_path_factory.mktemp("page") / "store"
    shutil.copytree(REGISTRY_PATH, store)
    args = EngineArgs(bundle="sprites@champion", store_url=f"file://{store}")
    service = GenerationService(open_engine(args), max_queue_s=60)
    service.warm_up()
    yield service
    service.close()


@pytest.fixture(scope="session")
def evaluated(page_service) -> Path:
    """The folder of the evaluation that the bundle was shipped with."""
    store = Path(page_service.opened.args.store_url.removeprefix("file://"))
    [summary] = store.glob(f"evaluations/{page_service.opened.card.bundle.digest}/*/summary.json")
    return summary.parent


@pytest.fixture(scope="session")
def page_url(page_service):
    from workers.routes import create_http

    with serve(create_http(page_service)) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    """For one module: while Playwright runs, its event loop runs in the thread that other tests share."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """One tab: what it was asked for, what it complained about, and what it shows."""

    def __init__(self, context, url: str) -> None:
        self.page = context.new_page()
        self.url = url
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.bodies: list[dict] = []
        self.failed = 0
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)
        self.page.on("response", self._check)
        self.page.on("requestfailed", lambda request: setattr(self, "failed", self.failed + 1))

    def _hear(self, message) -> None:
        # The browser reports every refused request itself; the page has its own words for those.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def _check(self, response) -> None:
        if response.status >= 400 and "/v1/" not in response.url:
            self.complaints.append(f"{response.status} {response.url}")

    def _note(self, request) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.foreign.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def open_quick(self, fragment: str = "") -> Visit:
        """With settings that take a moment to make."""
        return self.open(f"steps=4&guidance=1&{fragment}")

    @property
    def own(self) -> list[dict]:
        """Bodies of the requests for the user's own image."""
        return [body for body in self.bodies if body.get("stream")]

    def open(self, fragment: str) -> Visit:
        self.page.goto(f"{self.url}/#{fragment}")
        return self

    def locate(self, selector: str):
        return self.page.locator(selector)

    def wanted(self) -> dict:
        """The settings in the address."""
        fields = {name: values[0] for name, values in parse_qs(urlsplit(self.page.url).fragment).items()}
        pairs = (part.split(":") for part in fields["weights"].split(","))
        weights = {name: float(value) for name, value in pairs}
        numbers = {name: float(fields[name]) for name in ("lambda", "seed", "steps", "guidance")}
        return {"prompt": fields["prompt"], "method": fields["method"], "weights": weights, **numbers}

    def png(self) -> bytes | None:
        """The finished image that is shown."""
        source = self.locate("#download").get_attribute("href")
        return base64.b64decode(source.partition(",")[2]) if source else None

    def settle(self):
        """Wait until the image that is shown is the one that the address asks for; return the facts it carries."""
        from workers.images import read_facts

        def facts():
            png = self.png()
            found = read_facts(png) if png else None
            return found if found and self._agrees(found) else None

        return self.until(facts)

    def _agrees(self, facts) -> bool:
        wanted = self.wanted()
        made = {
            "prompt": facts.prompt,
            "method": facts.method,
            "lambda": facts.kl_lambda,
            "seed": facts.seed,
            "steps": facts.num_inference_steps,
            "guidance": facts.guidance_scale,
        }
        return all(wanted[name] == value for name, value in made.items()) and wanted["weights"] == pytest.approx(
            facts.weights, abs=1e-6
        )

    def until(self, condition: Callable[[], object]) -> object:
        """What `condition` returns, once that is true; the page's events go on meanwhile."""
        return wait_for(condition, pause=lambda seconds: self.page.wait_for_timeout(1000 * seconds))


@pytest.fixture
def visit(chromium, page_url):
    """A factory of tabs; each must end without complaints and without requests to anyone else."""
    contexts, visits = [], []

    def make(url: str = page_url, *, width: int = 1280, height: int = 900, **options) -> Visit:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **options))
        visits.append(Visit(contexts[-1], url))
        return visits[-1]

    yield make
    for context in contexts:
        context.close()
    for tab in visits:
        assert (tab.complaints, tab.foreign) == ([], [])
