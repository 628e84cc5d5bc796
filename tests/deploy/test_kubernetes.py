"""The manifests of deploy/kubernetes: valid for Kubernetes, and one with the server and each other."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import SchemaNotFoundError, latest_version, validate

from server.config import ServerConfig, load_config
from server.metrics import Metrics
from server.metrics_compat import make_metrics
from tests.deploy.confinement import check_decoding_pod

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deploy/kubernetes"
PLACES = ("cpu", "gpu")
# Of the Prometheus Operator and of the Gateway API Inference Extension: Kubernetes has no schema of them.
UNCHECKED = {"PodMonitor", "InferencePool"}
ROUTING_GAUGES = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")


def resources(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def of_kind(place: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in resources(f"{place}.yml") if each["kind"] == kind]
    return found


def pod(place: str) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(place, "Deployment")["spec"]["template"]["spec"]
    return spec


def test_every_manifest_is_valid_or_listed() -> None:
    unchecked = set()
    for path in FOLDER.glob("*.yml"):
        for resource in resources(path.name):
            try:
                validate(resource, latest_version(), strict=True)
            except SchemaNotFoundError:
                unchecked.add(resource["kind"])
    assert unchecked == UNCHECKED


@pytest.mark.parametrize("place", PLACES)
def test_probes_tell_life_from_readiness(place: str) -> None:
    (container,) = pod(place)["containers"]
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness")}
    assert paths == {"startup": "/ready", "readiness": "/ready"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"


@pytest.mark.parametrize("place", PLACES)
def test_what_runs_may_end(place: str) -> None:
    spec = pod(place)
    (container,) = spec["containers"]
    drain = ServerConfig.model_fields["shutdown_timeout"].default
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > before + drain


@pytest.mark.parametrize("place", PLACES)
def test_pods_are_confined(place: str) -> None:
    spec = pod(place)
    (container,) = spec["containers"]
    check_decoding_pod(spec)
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("place", PLACES)
def test_services_and_scaling_find_their_pods(place: str) -> None:
    deployment, service = of_kind(place, "Deployment"), of_kind(place, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    (container,) = pod(place)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    scaler = of_kind(place, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = scaler["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in Metrics("0").exposition().decode()
    (monitor,) = resources("podmonitor.yml")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports.keys()


@pytest.mark.parametrize("place", PLACES)
def test_a_gateway_finds_the_pods_and_what_it_routes_by(place: str) -> None:
    (pool,) = resources("inferencepool.yml")
    labels = of_kind(place, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (container,) = pod(place)["containers"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert {port["number"] for port in pool["spec"]["targetPorts"]} <= ports
    metrics = make_metrics(ServerConfig())
    metrics.requests_waiting.labels("tiny").set(0)
    metrics.requests_running.labels("tiny").set(0)
    metrics.cache_usage.labels("0", "target").set(0)
    shown = metrics.exposition().decode()
    assert [gauge for gauge in ROUTING_GAUGES if f"# TYPE {gauge} gauge" not in shown] == []


@pytest.mark.parametrize("place", PLACES)
def test_the_server_accepts_its_environment(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container,) = pod(place)["containers"]
    keys = tmp_path / "keys.txt"
    keys.write_text("a-key\n")
    (port,) = container["ports"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"].replace("/run/keys/keys.txt", str(keys)))
    config = load_config([])
    assert (config.host, config.port) == ("0.0.0.0", port["containerPort"])
    assert len(config.key_digests) == 1, "a pod that any other can reach asks for keys"
    assert config.has_draft
