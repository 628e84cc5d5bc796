"""The files of a deployment as their own tools see them: linters, schemas, promtool."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import program

ROOT = Path(__file__).parent.parent.parent
VALIDATORS = {
    "yamllint": ["--strict", ".yamllint.yml", "docker-compose.yml", "deploy"],
    "hadolint": ["Dockerfile"],
    "check-jsonschema": [
        "--builtin-schema",
        "vendor.compose-spec",
        "docker-compose.yml",
        "deploy/ray/docker-compose.yml",
    ],
}


def run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("tool", VALIDATORS)
def test_a_validator_finds_nothing(tool: str) -> None:
    run([str(Path(sys.executable).parent / tool), *VALIDATORS[tool]])


def test_promtool_accepts_the_configuration() -> None:
    run([program("promtool"), "check", "config", "--lint-fatal", "deploy/prometheus/prometheus.yml"])
