"""The files of a deployment as their own tools see them: linters, schemas, promtool."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMMANDS = {
    "yamllint": ["--strict", ".yamllint.yml"],
    "hadolint": ["Dockerfile"],
}


@pytest.mark.parametrize("tool", COMMANDS)
def test_tool_finds_nothing(tool: str) -> None:
    command = [str(Path(sys.executable).parent / tool), *COMMANDS[tool]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
