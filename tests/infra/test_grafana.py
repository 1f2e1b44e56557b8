"""The dashboard has what Grafana's import asks for, and shows what the endpoint declares and nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Counter, Histogram

import infra
from workers.ray_metrics import DECLARED, PREFIX

GRAFANA = Path(infra.__file__).parent / "grafana"
BOARD = json.loads((GRAFANA / "diffusion_blend.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
# what Ray and Serve export of themselves
BUILT_IN = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_autoscaling_target_replicas",
    "ray_component_rss_bytes",
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def exported(name: str) -> set[str]:
    """Names on Ray's Prometheus page of what is declared as `name`."""
    kind, full = DECLARED[name].kind, f"ray_{PREFIX}_{name}"
    if kind is Histogram:
        return {f"{full}_{part}" for part in ("bucket", "sum", "count")}
    return {f"{full}_total" if kind is Counter else full}


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", re.sub(r'"[^"]*"', '""', expression)))


def test_the_dashboard_can_be_imported():
    assert BOARD["title"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", BOARD["uid"])
    assert BOARD["schemaVersion"] >= 36
    assert "id" not in BOARD, "Grafana numbers dashboards itself"
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for variable in re.findall(r"\$(?!__)\{?(\w+)", json.dumps([PANELS, EXPRESSIONS])):
        assert variable in variables or variable == "1", f"${variable} is not defined"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_where_from(panel):
    assert panel["type"] in ("stat", "timeseries")
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["datasource"] == DATASOURCE
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert target["legendFormat"]


def test_panels_lie_side_by_side_on_the_grid_of_24():
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells


def test_expressions_name_only_what_is_exported():
    known = BUILT_IN.union(*map(exported, DECLARED))
    for expression in EXPRESSIONS:
        assert names_in(expression)
        assert names_in(expression) <= known
        assert expression.count("(") == expression.count(")")
        assert 'SessionName=~"$cluster"' in expression


def test_expressions_use_only_labels_that_are_declared():
    own = {label for declared in DECLARED.values() for label in declared.labels}
    rays = {"SessionName", "Component", "WorkerId", "application", "deployment", "le"}
    made = {"short", "part"}  # by label_replace
    for expression in EXPRESSIONS:
        matched = re.findall(r"(\w+)(?:=~?|!=|!~)\"", expression)
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        assert {*matched, *(label.strip() for group in grouped for label in group.split(","))} <= own | rays | made


def test_every_declared_metric_is_shown():
    shown = set().union(*map(names_in, EXPRESSIONS))
    assert [name for name in DECLARED if not exported(name) & shown] == []


def test_rates_are_taken_of_what_only_grows():
    for expression in EXPRESSIONS:
        for name in re.findall(r"rate\((ray_\w+)", expression):
            assert name.endswith(("_total", "_bucket", "_sum", "_count"))


def test_prometheus_is_told_of_both_ways_to_run_the_endpoint():
    [job] = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9464"]}]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
