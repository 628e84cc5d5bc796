"""What the Dockerfile promises, and that the files it takes are enough to serve."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from dockerfile_parse import DockerfileParser

from tests.e2e.conftest import free_port, until

ROOT = Path(__file__).parent.parent.parent
PYTHON = "/app/.venv/bin/python"


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[str, str]]]:
    """Instructions with their values, a list per stage."""
    # The parser opens its file for writing, too.
    copy = tmp_path_factory.mktemp("dockerfile") / "Dockerfile"
    shutil.copy(ROOT / "Dockerfile", copy)
    found: list[list[tuple[str, str]]] = [[]]
    for line in DockerfileParser(str(copy)).structure:
        if line["instruction"] == "FROM":
            found.append([])
        if line["instruction"] != "COMMENT":
            found[-1].append((line["instruction"], line["value"]))
    return found[1:]


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


def health_command(stage: list[tuple[str, str]]) -> list[str]:
    (check,) = values(stage, "HEALTHCHECK")
    command: list[str] = json.loads(check.partition("CMD ")[2])
    return command


def test_two_stages_on_one_base_install_as_developers_do(stages: list[list[tuple[str, str]]]) -> None:
    build, final = stages
    assert values(build, "FROM") == ["${BASE} AS build"]
    assert values(final, "FROM") == ["${BASE}"]
    assert 'scripts/install "${INSTALL}"' in values(build, "RUN")
    assert "INSTALL=--energy" in values(build, "ARG")
    everything = " ".join(value for stage in stages for _, value in stage)
    assert not re.search(r"\b(apt|apt-get|gcc|build-essential|make)\b", everything), "nothing is compiled"


def test_the_final_stage_is_not_root_and_runs_without_a_shell(stages: list[list[tuple[str, str]]]) -> None:
    final = stages[-1]
    last_command = max(n for n, (name, _) in enumerate(final) if name in ("RUN", "COPY"))
    assert values(final[last_command:], "USER") == ["10001:10001"]
    assert [json.loads(value) for value in values(final, "ENTRYPOINT")] == [[PYTHON, "-m", "server"]]
    assert values(final, "CMD") == []
    command = health_command(final)
    assert command[:2] == [PYTHON, "-c"]
    assert "127.0.0.1:8000/health" in command[2]


def test_the_context_holds_what_is_copied_and_no_more(stages: list[list[tuple[str, str]]]) -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    allowed = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    assert patterns[0] == "*"
    copied = {source for value in values(stages[0], "COPY") for source in value.split()[:-1]}
    assert {source for source in copied if not any(source.startswith(each) for each in allowed)} == set()
    assert allowed - copied == set()


@pytest.mark.slow
def test_the_files_of_the_image_serve_and_are_healthy(
    stages: list[list[tuple[str, str]]], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The final stage's folders alone, its entry point and its health check, but for the port."""
    image, home = tmp_path / "app", tmp_path / "home"
    home.mkdir()
    for value in values(stages[-1], "COPY"):
        source = value.split()[1]
        if source.startswith("/app/") and source != "/app/.venv":
            shutil.copytree(ROOT / source.removeprefix("/app/"), image / source.removeprefix("/app/"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MMTAD_")}
    environment.pop("PYTHONPATH", None)
    environment |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"MMTAD_HOST": "127.0.0.1", "MMTAD_PORT": str(port := free_port())}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=image, env=environment, capture_output=True, text=True, check=False
        )

    located = python("-c", "import decoding, server; print(decoding.__path__[0], server.__path__[0])")
    assert located.stdout.split() == [str(image / "decoding"), str(image / "server")]
    check = [argument.replace(":8000/", f":{port}/") for argument in health_command(stages[-1])[1:]]
    assert python(*check).returncode != 0, "healthy before the server runs"
    models = ["--model", str(pair[0]), "--speculative-config.model", str(pair[1])]
    entry_point = json.loads(values(stages[-1], "ENTRYPOINT")[0])[1:]
    log = tmp_path / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, *entry_point, *models], cwd=image, env=environment, stdout=output, stderr=output
        ) as process,
    ):
        try:
            until(lambda: process.poll() is not None or '"ready"' in log.read_text(), 120)
            assert process.poll() is None, log.read_text()
            assert python(*check).returncode == 0
            body = {"model": str(pair[0]), "prompt": "x", "max_tokens": 4}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            process.terminate()
            assert process.wait(45) == 0
        finally:
            process.kill()
    written = {path.relative_to(home).parts[:3] for path in home.rglob("*") if path.is_file()}
    mounted = {(".cache", "mmtad", name) for name in ("tokenizers", "costs")}
    assert written <= mounted, "written outside the folders of the image's user"
