"""infra/prefect.yaml and automations.yaml on a real Prefect server: the README's commands register them, events set
off what they say, a worker runs a deployment."""

import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from waiting import wait_for

from flows.local_services import prefect_server, prefect_worker

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
NAMES = {"train-basis", "evaluate-blend", "deploy-blend", "full-pipeline"}
BIN = Path(sys.executable).parent


def prefect(environment: dict[str, str], *arguments: str, timeout: float = 500) -> str:
    done = subprocess.run(
        [str(BIN / "prefect"), "--no-prompt", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A server that has the work pool and all deployments; yields its home and environment."""
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home) as environment:
        prefect(environment, "work-pool", "create", "blend", "--type", "process")
        prefect(environment, "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
        prefect(environment, "automation", "create", "--from-file", "infra/automations.yaml")
        yield home, environment


def inspect(environment: dict[str, str], name: str) -> dict:
    """What the server says of a deployment."""
    answer = httpx.get(f"{environment['PREFECT_API_URL']}/deployments/name/{name}/{name}", timeout=60)
    return answer.raise_for_status().json()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_deployment_is_registered_by_module_path(deployed, name):
    _, environment = deployed
    facts = inspect(environment, name)
    assert facts["entrypoint"] == "flows.{0}.{0}".format(name.replace("-", "_"))
    assert facts["work_pool_name"] == "blend"
    assert facts["parameter_openapi_schema"]["properties"]


def test_only_the_evaluation_is_scheduled(deployed):
    _, environment = deployed
    schedules = {name: inspect(environment, name)["schedules"] for name in NAMES}
    [schedule] = schedules.pop("evaluate-blend")
    assert schedule["schedule"]["cron"] == "0 4 * * *"
    assert schedule["active"]
    assert not any(schedules.values())


def test_a_registered_bundle_is_to_be_evaluated(deployed, store_url):
    _, environment = deployed
    command = [sys.executable, "-m", "flows.cli", "registry", "bundle", "pair", "warm", "small", "--store", store_url]
    command += ["--guidance-scale", "2", "--steps", "4"]
    for _ in range(5):
        # a busy server may not hear in time; publishing the same again tells it again
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        if "was not told" not in done.stderr:
            break
    asked = {"deployments": {"name": {"any_": ["evaluate-blend"]}}}

    def triggered() -> dict | None:
        runs = httpx.post(f"{environment['PREFECT_API_URL']}/flow_runs/filter", json=asked, timeout=60).json()
        return next((run for run in runs if run["parameters"]), None)

    run = wait_for(triggered)
    assert run["parameters"] == {"run": {"bundle": "pair@1"}, "store_url": store_url}
    assert run["state_type"] in ("SCHEDULED", "PENDING")


def test_the_run_that_found_a_regression_is_marked_and_no_other(deployed):
    api = deployed[1]["PREFECT_API_URL"]
    flow = httpx.post(f"{api}/flows/", json={"name": "evaluate-blend"}, timeout=60).json()

    def finished_run(event: str) -> str:
        """The id of a run that has ended and told of this event."""
        body = {"flow_id": flow["id"], "state": {"type": "COMPLETED"}}
        run = httpx.post(f"{api}/flow_runs/", json=body, timeout=60).raise_for_status().json()
        related = {"prefect.resource.id": f"prefect.flow-run.{run['id']}", "prefect.resource.role": "flow-run"}
        told = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": f"diffusion-blend.evaluation.{event}",
            "resource": {"prefect.resource.id": "diffusion-blend.bundle.pair", "prefect.resource.name": "pair@1"},
            "related": [related],
        }
        httpx.post(f"{api}/events", json=[told], timeout=60).raise_for_status()
        return run["id"]

    def read(run: str, state: str) -> dict | None:
        found = httpx.get(f"{api}/flow_runs/{run}", timeout=60).json()
        return found if found["state_name"] == state else None

    # the automation has seen the first event by the time that it acts on the second
    passed, regressed = finished_run("finished"), finished_run("regressed")
    assert wait_for(lambda: read(regressed, "Regressed"))["state_type"] == "FAILED"
    assert read(passed, "Completed")["state_type"] == "COMPLETED"


def test_a_worker_trains_an_adapter_on_request(deployed, tmp_path, tiny_sd_dir):
    home, environment = deployed
    run = {
        "name": "tiny-colour",
        "base_model": str(tiny_sd_dir),
        "reward": "colourfulness",
        "prompts": ["A red car.", "A blue cup."],
        "held_out_prompts": ["A green cup."],
        "iterations": 1,
        "prompts_per_iteration": 2,
        "images_per_prompt": 2,
        "num_inference_steps": 3,
        "train_steps_per_sample": 1,
        "held_out_images": 2,
        "num_workers": 0,
    }
    store = tmp_path / "store"
    parameters = {"run": run, "store_url": f"file://{store}", "output_dir": str(tmp_path / "run")}
    with prefect_worker("blend", home, environment):
        prefect(
            environment, "deployment", "run", "train-basis/train-basis", "--watch", "--params", json.dumps(parameters)
        )
    manifest = json.loads((store / "adapters/tiny-colour/versions/000001.json").read_text())
    assert manifest["reward"] == "colourfulness"
    assert manifest["run_ids"]["prefect"]
