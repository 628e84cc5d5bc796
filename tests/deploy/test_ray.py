"""The files of deploy/ray: confined like the others, with commands that Ray and the server understand."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub.cli.hf import app as hub
from huggingface_hub.utils._paths import filter_repo_objects
from kubernetes_validate import SchemaNotFoundError, latest_version, validate

from decoding.embedded import OUTPUT_HEAD_FILE
from server.config import ServerConfig, load_config
from tests.deploy.confinement import WRITTEN, check_decoding_pod, check_pod, check_service

FOLDER = Path(__file__).parent.parent.parent / "deploy/ray"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
CLUSTER: dict[str, Any] = yaml.safe_load((FOLDER / "raycluster.yml").read_text(encoding="utf-8"))
GROUPS: list[dict[str, Any]] = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
PODS: list[dict[str, Any]] = [group["template"] for group in GROUPS]


def containers() -> list[dict[str, Any]]:
    return [container for pod in PODS for container in pod["spec"]["containers"]]


def shell_lines() -> list[str]:
    lines = [service["command"][0] for service in SERVICES.values() if "command" in service]
    return lines + [container["args"][0] for container in containers()]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    check_service(service)
    mounted = [entry.split(":") for entry in service["volumes"] if not entry.endswith(":ro")]
    assert {path for _, path in mounted} | {entry.split(":")[0] for entry in service["tmpfs"]} == WRITTEN
    assert service["build"]["args"]["INSTALL"] == "--ray"


def test_nobody_outside_reaches_the_cluster() -> None:
    assert COMPOSE["networks"]["cluster"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "cluster" in service["networks"]} == {
        "head",
        "node",
        "node-gpu",
    }
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["head"]


def test_nodes_load_what_one_service_fetches_at_the_users_word() -> None:
    fetch, *nodes = (SERVICES[name] for name in ("fetch", "node", "node-gpu"))
    assert (fetch["networks"], fetch["profiles"], fetch["restart"]) == (["outside"], ["fetch"], "no")
    assert fetch["environment"]["HF_HUB_OFFLINE"] == "0"
    for node in nodes:
        assert node["networks"] == ["cluster"]
        assert node["environment"]["HF_HUB_OFFLINE"] == "1", "a clear error at once, not a timeout"
        assert node["environment"]["HF_HOME"] == fetch["environment"]["HF_HOME"]
        assert node["volumes"] == fetch["volumes"]


def test_the_files_that_loading_reads_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    program, name, *flags = SERVICES["fetch"]["entrypoint"]
    assert (program, name) == (".venv/bin/hf", "download")
    asked: dict[str, Any] = {}

    def record(**arguments: Any) -> str:
        asked.update(arguments)
        return "folder"

    monkeypatch.setattr("huggingface_hub.cli.download.snapshot_download", record)
    result = CliRunner().invoke(hub, [name, *flags, "org/model"])
    assert result.exit_code == 0, result.output
    read = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        OUTPUT_HEAD_FILE,
    ]
    others = ["pytorch_model.bin", "consolidated.safetensors", "model.gguf", "tf_model.h5"]
    found = filter_repo_objects(
        [*read, *others], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert (asked["repo_id"], list(found)) == ("org/model", read)


def test_there_is_a_node_for_every_worker() -> None:
    workers = SERVICES["head"]["environment"]["MMTAD_NUM_WORKERS"]
    assert SERVICES["node"]["deploy"]["replicas"] == workers == "${RAY_NODES:-2}"


def test_the_manifest_of_an_operator_is_not_checked_but_its_pods_are() -> None:
    with pytest.raises(SchemaNotFoundError):
        validate(CLUSTER, latest_version(), strict=True)
    for pod in PODS:
        metadata = {"name": "pod", **pod["metadata"]}
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        validate(whole, latest_version(), strict=True)


def test_pods_are_confined() -> None:
    head, *nodes = PODS
    check_pod(head["spec"])
    for node in nodes:
        check_decoding_pod(node["spec"])


def test_what_runs_may_end() -> None:
    drain = ServerConfig.model_fields["shutdown_timeout"].default
    assert int(SERVICES["head"]["stop_grace_period"].removesuffix("s")) > drain
    spec = PODS[0]["spec"]
    before = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > before + drain


@pytest.mark.parametrize("line", shell_lines())
def test_ray_understands_its_flags(line: str) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts", reason="Ray is not installed")
    start = re.search(r"\.venv/bin/ray start (.*?)(?:&&|$)", line, re.DOTALL)
    assert start is not None
    filled = re.sub(r'"?\$\$?\{?\w+\}?(:6379)?"?', lambda match: f"1{match[1] or ''}", start[1])
    values = scripts.start.make_context("start", shlex.split(filled)).params
    assert values["disable_usage_stats"] is True
    assert values["head"] != bool(values["address"])
    if values["head"]:
        assert values["include_dashboard"] is False
        assert values["num_cpus"] == 0
        assert line.rstrip().endswith("&& exec .venv/bin/python -m server")


def test_the_version_is_the_pinned_one() -> None:
    constraints = (FOLDER.parent.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={CLUSTER['spec']['rayVersion']}" in constraints


@pytest.mark.parametrize("place", ["compose", "kubernetes"])
def test_the_server_accepts_its_environment(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    keys = tmp_path / "keys.txt"
    keys.write_text("a-key\n")
    variables = SERVICES["head"]["environment"]
    if place == "kubernetes":
        variables = {each["name"]: each["value"] for each in containers()[0]["env"]}
    for name, value in variables.items():
        filled = re.sub(r"\$\{\w+:-(\w*)\}", r"\1", value)
        monkeypatch.setenv(name, filled.replace("/run/keys/keys.txt", str(keys)))
    config = load_config([])
    assert (config.host, config.port) == ("0.0.0.0", 8000)
    assert (config.worker_backend, config.num_workers) == ("ray", 2)
