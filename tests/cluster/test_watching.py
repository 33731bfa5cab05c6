"""Prometheus' configuration and Grafana's dashboard: they ask for metrics that there are."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.metrics import dashboards

from raylm.messages import EngineStatistics
from raylm.serve.metrics import render
from raylm.statistics import ModelState, SlotStatistics

from .manifests import CLUSTER, documents, find, ports

_DASHBOARD: dict[str, Any] = json.loads((CLUSTER / "grafana.json").read_text())
_PANELS: list[dict[str, Any]] = _DASHBOARD["panels"]
_QUERIES = [target["expr"] for panel in _PANELS for target in panel["targets"]]


def _exported() -> dict[str, set[str]]:
    """Return the labels of each of raylm's series, as its endpoint tells them."""
    slot = SlotStatistics(
        slot=0,
        state="up",
        detail="",
        model="model",
        device="",
        num_running=0,
        capacity=1,
        outstanding_tokens=0,
        num_deaths=0,
        actor="",
        node="",
        pid=None,
        gpus=[],
        engine=EngineStatistics(num_running=0, num_tokens=0),
    )
    state = ModelState(name="model", moves={"died": 1}, slots=[slot])
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(render([state], {"completed": 1}).decode()):
        for sample in family.samples:
            labels[sample.name] = set(sample.labels)
    return labels


def _rays() -> set[str]:
    """Return the series that Ray's own dashboards ask for."""
    folder = Path(dashboards.__file__).parent
    return set(re.findall(r"\bray_[a-z0-9_]+", "".join(path.read_text() for path in folder.glob("*_panels.py"))))


def _series(query: str) -> set[str]:
    """Return the series that a query asks for: the words that are neither in braces nor labels or functions."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on) \([^)]*\)", "", query)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w)(?! *\()", bare)
    return set(words)


@pytest.mark.parametrize("query", _QUERIES)
def test_a_query_asks_for_metrics_that_there_are(query: str) -> None:
    """Raylm's endpoint exports them, or Ray's own dashboards ask for them."""
    series = _series(query)
    assert series
    assert series - set(_exported()) - _rays() == set()


@pytest.mark.parametrize("query", [query for query in _QUERIES if "raylm_" in query])
def test_a_query_asks_for_labels_that_there_are(query: str) -> None:
    """Filters and groups are by labels that the series have."""
    exported = _exported()
    filters = re.findall(r"(\w+)\{([^}]*)\}", query)
    asked = {name: set(re.findall(r"(\w+) *(?:=~|!~|!=|=)", labels)) for name, labels in filters}
    for grouped in re.findall(r"\bby \(([^)]*)\)", query):
        for name in _series(query):
            asked.setdefault(name, set()).update(re.findall(r"\w+", grouped))
    assert {name: labels - exported[name] for name, labels in asked.items() if labels - exported[name]} == {}


@pytest.mark.parametrize("panel", _PANELS, ids=lambda panel: str(panel["title"]))
def test_a_legend_names_labels_that_the_query_keeps(panel: dict[str, Any]) -> None:
    """A legend has no label that was summed over."""
    for target in panel["targets"]:
        kept = re.findall(r"\bby \(([^)]*)\)", target["expr"])
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert not kept or named <= set(re.findall(r"\w+", kept[0]))


def test_every_metric_of_raylm_is_on_the_dashboard() -> None:
    """What raylm exports is shown."""
    asked = {re.sub(r"_(total|bucket|sum|count)$", "", name) for query in _QUERIES for name in _series(query)}
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in _exported()}
    assert families - asked == {"raylm_slot_running"}  # which outstanding tokens say better


def test_the_dashboard_has_what_grafana_asks_for() -> None:
    """It has the fields of a dashboard, and panels of known types with ids of their own."""
    assert _DASHBOARD["title"]
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", _DASHBOARD["uid"])
    assert _DASHBOARD["schemaVersion"] >= 36
    assert set(_DASHBOARD["time"]) == {"from", "to"}
    assert len({panel["id"] for panel in _PANELS}) == len(_PANELS)
    for panel in _PANELS:
        assert {"id", "type", "title", "datasource", "gridPos", "fieldConfig", "targets"} <= set(panel)
        assert panel["type"] in ("stat", "timeseries")
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_its_variables_are_defined() -> None:
    """No query has a variable that there is not, and no variable is without use."""
    defined = {variable["name"] for variable in _DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(_PANELS)))
    assert used == defined


def test_no_panel_lies_on_another() -> None:
    """The panels share the grid."""
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in _PANELS)
    ]
    assert all(not one & other for one, other in combinations(cells, 2))
    assert max(x for taken in cells for x, _ in taken) == 23  # Grafana's grid is 24 wide


def test_prometheus_has_jobs_with_targets() -> None:
    """raylm, Ray and Triton are scraped."""
    (config,) = documents("prometheus.yaml")
    assert set(config) == {"global", "scrape_configs"}
    names = [job["job_name"] for job in config["scrape_configs"]]
    assert names == ["raylm", "ray", "triton"]
    known = {"job_name", "static_configs", "kubernetes_sd_configs", "relabel_configs"}
    assert all(set(job) <= known for job in config["scrape_configs"])


def test_prometheus_keeps_the_port_of_rays_metrics() -> None:
    """The port's name is that of the pods."""
    job = documents("prometheus.yaml")[0]["scrape_configs"][1]
    (kept,) = (
        rule["regex"]
        for rule in job["relabel_configs"]
        if rule["source_labels"] == ["__meta_kubernetes_pod_container_port_name"]
    )
    pod = find("rayservice.yaml", "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert kept in ports(pod)


def test_prometheus_finds_triton() -> None:
    """The target is the Service's port for metrics."""
    targets = documents("prometheus.yaml")[0]["scrape_configs"][2]["static_configs"][0]["targets"]
    listening = {port["name"]: port["port"] for port in find("triton.yaml", "Service")["spec"]["ports"]}
    assert targets == [f"triton.default.svc:{listening['metrics']}"]


def test_the_commented_part_is_valid_too() -> None:
    """What is said about API keys, and where Ray lists its nodes."""
    text = (CLUSTER / "prometheus.yaml").read_text()
    with_keys = yaml.safe_load(text.replace("# authorization:", "authorization:"))
    assert with_keys["scrape_configs"][0]["authorization"] == {"credentials_file": "/run/secrets/raylm"}
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert f"/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}" in text
