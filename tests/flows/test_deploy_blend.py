"""The deploy flow on a real Prefect and Ray Serve: it returns the URL of an endpoint that answers."""

import subprocess
import sys

import httpx
import pytest

from flows.deploy_blend import deploy_blend
from infra.errors import UnknownRecordError

pytestmark = pytest.mark.slow


def artifacts() -> dict[str, str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client._client.post("/artifacts/latest/filter", json={}).json()
    return {artifact["key"]: artifact["data"] for artifact in found}


@pytest.mark.long
def test_a_bundle_is_deployed_tried_and_reported(prefect, serving, tiny_store_url):
    from workers.deploying import check_port, undeploy

    port = check_port("127.0.0.1", 0)
    url = deploy_blend(bundle="tiny@champion", store_url=tiny_store_url, port=port)
    assert url == f"http://127.0.0.1:{port}"
    [card] = httpx.get(f"{url}/v1/models").json()["data"]
    assert card["bundle"]["name"] == "tiny"
    assert card["accepted_names"] == ["tiny", "tiny@1", "tiny@champion"]
    undeploy()
    reported = artifacts()
    assert url in reported["endpoint"]
    assert card["bundle"]["digest"] in reported["endpoint-facts"]
    assert "| warm | colourfulness |" in reported["endpoint-facts"]


def test_without_a_lasting_cluster_it_says_what_to_start(monkeypatch):
    """In a process of its own: this one may be connected for other tests."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asks = "from flows.deploy_blend import lasting_cluster; lasting_cluster(None).__enter__()"
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ray start --head" in done.stderr


def test_an_unknown_bundle_fails_before_any_cluster_is_asked(prefect, tiny_store_url):
    with pytest.raises(UnknownRecordError, match="nothing"):
        deploy_blend(bundle="nothing@champion", store_url=tiny_store_url, address="127.0.0.1:1")
