"""What docker-compose.yml promises of every service."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.confinement import check_service

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    check_service(service)
    assert not {"privileged", "network_mode", "cap_add", "pid"} & service.keys()
    assert service["image"] == "mmtad-server" or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_nothing_has_to_be_prepared() -> None:
    text = FILE.read_text(encoding="utf-8")
    variables = re.findall(r"\$\{(\w+)(:-[^}]*)?\}", text)
    assert variables
    assert [name for name, default in variables if not default] == []
    assert all(entry["required"] is False for entry in SERVICES["server"]["env_file"])
    mounts = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    files = [source for source in mounts if source.startswith(".")]
    assert [source for source in files if not (ROOT / source).exists()] == []
    assert {source for source in mounts if not source.startswith(".")} == COMPOSE["volumes"].keys()


def test_the_server_ends_before_it_is_killed() -> None:
    from server.config import ServerConfig

    seconds = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert seconds > ServerConfig.model_fields["shutdown_timeout"].default


def test_metrics_have_no_way_out() -> None:
    assert COMPOSE["networks"]["metrics"] == {"internal": True}
    assert SERVICES["prometheus"]["networks"] == ["metrics"]
    assert "ports" not in SERVICES["prometheus"]
    assert all("metrics" in service["networks"] for service in SERVICES.values())


def test_grafana_has_no_account() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert not [name for name in environment if "PASSWORD" in name]


def test_the_gpu_is_a_profile() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["server-gpu"]
    gpu = SERVICES["server-gpu"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["networks"]["metrics"] == {"aliases": ["server"]}, "Prometheus asks the name server"


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_the_server_accepts_its_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.config import load_config

    for variable, value in SERVICES[name]["environment"].items():
        if variable.startswith("MMTAD_"):
            monkeypatch.setenv(variable, value)
    config = load_config([])
    assert (config.host, config.port, config.key_digests) == ("0.0.0.0", 8000, ())
    assert config.device == ("cuda" if name == "server-gpu" else "auto")
