"""The dashboard and its provisioning fit each other, Prometheus and docker-compose.yml."""

import json
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).parent.parent.parent
GRAFANA = ROOT / "deploy/grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards/mmtad.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_data_source_is_the_composed_prometheus() -> None:
    (source,) = read("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    used = {json.dumps(each["datasource"], sort_keys=True) for panel in PANELS for each in panel["targets"]}
    assert used == {json.dumps({"type": source["type"], "uid": source["uid"]}, sort_keys=True)}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in read("docker-compose.yml")["services"]
    interval = read("deploy/prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


def test_the_dashboard_lies_where_grafana_looks() -> None:
    grafana = read("docker-compose.yml")["services"]["grafana"]
    (provider,) = read("deploy/grafana/provisioning/dashboards/files.yml")["providers"]
    path = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{path}:ro" in grafana["volumes"]
    assert "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{path}/mmtad.json"


def lost(written: Any, read: Any, path: str = "") -> list[str]:
    """Where what was read and written again differs from what was written at first."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [each for name in written for each in lost(written[name], read.get(name), f"{path}/{name}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = enumerate(zip(written, read, strict=True))
        return [each for number, (old, new) in pairs for each in lost(old, new, f"{path}/{number}")]
    return [] if written == read else [path]


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Its own types drop a field they do not know, and a value of another type."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert lost(DASHBOARD, read) == []
    unknown = json.loads(json.dumps(DASHBOARD))
    unknown["panels"][0]["options"]["legends"] = {}
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(unknown)))
    assert lost(unknown, read) == ["/panels/0/options/legends"]


def test_panels_have_their_own_place_and_say_what_they_show() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in PANELS)


def test_the_method_can_be_chosen_wherever_it_is_known() -> None:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    by_method = [expression for expression in expressions if "method" in expression]
    assert by_method
    assert all('method=~"$method"' in expression for expression in by_method)
