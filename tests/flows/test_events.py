"""A bundle published on the command line is told to Prefect if it is there, and published all the same if not."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect_events import wait_for_event

from flows.events import REGISTERED, announce
from infra.registry import Registry
from infra.storage import open_store

Run = Callable[..., tuple[int, str, str]]
PUBLISH = ("bundle", "pair", "warm", "small", "--guidance-scale", "2", "--steps", "4")
PROGRAM = """
import sys, time
from flows.cli import main
began = time.monotonic()
try:
    main(["registry", *sys.argv[1:]])
except SystemExit as ended:
    print(ended.code, "prefect" in sys.modules, time.monotonic() - began < 60)
"""


@pytest.mark.parametrize(
    ("api", "words"), [(None, ""), ("http://127.0.0.1:1/api", "was not told to http://127.0.0.1:1/api")]
)
def test_without_a_server_a_bundle_is_published_at_once(store_url, tmp_path, monkeypatch, api, words):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    if api:
        monkeypatch.setenv("PREFECT_API_URL", api)
    command = [sys.executable, "-c", PROGRAM, *PUBLISH, "--store", store_url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Published pair@1", f"0 {api is not None} True"]
    assert [words in line for line in done.stderr.splitlines()] == ([True] if api else [])
    assert Registry(open_store(store_url)).get_bundle("pair").version == 1


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr("flows.events.SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            began = time.monotonic()
            assert not announce(REGISTERED, "pair@1", {"ref": "pair@1"})
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_a_server_that_is_there_is_told_of_every_published_bundle(prefect, run: Run, store_url, monkeypatch):
    from prefect.settings import PREFECT_API_URL

    # busy machines take longer than people should wait
    monkeypatch.setattr("flows.events.SECONDS", 60.0)
    assert run(*PUBLISH)[:2] == (0, "Published pair@1\n")
    event = wait_for_event(PREFECT_API_URL.value(), REGISTERED, ref="pair@1", store=store_url)
    record = Registry(open_store(store_url)).get_bundle("pair")
    assert event["payload"] == {"ref": "pair@1", "digest": record.digest, "store": store_url}
    assert event["resource"] == {
        "prefect.resource.id": "diffusion-blend.bundle.pair",
        "prefect.resource.name": "pair@1",
    }


def test_the_notification_that_the_automations_file_shows_is_a_valid_one():
    import yaml
    from prefect.server.events.schemas.automations import AutomationCore
    from prefect.server.utilities.user_templates import render_user_template_sync

    lines = (Path(__file__).parents[2] / "infra" / "automations.yaml").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if "# - type: send-notification" in line)
    shown = [line.replace("# ", "", 1) for line in lines[start:]]
    [automation] = yaml.safe_load("\n".join([*lines[:start], *shown]))["automations"]
    AutomationCore.model_validate(automation)
    comparison = {"against": {"bundle": "pair@1"}}
    payload = {"bundle": "pair@2", "text": "Worse.", "location": "s3://blend/e", "comparison": comparison}
    event = SimpleNamespace(payload=payload)
    mark, notify = automation["actions"]
    assert mark["type"] == "change-flow-run-state"
    subject, body = (render_user_template_sync(notify[part], {"event": event}) for part in ("subject", "body"))
    assert subject == "pair@2 is worse than pair@1"
    assert body == "Worse. s3://blend/e/report.html"
