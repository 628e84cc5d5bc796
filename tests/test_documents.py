"""Every command of README.md and docs/ that needs no container engine: run, or at least understood."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from dotenv import dotenv_values

from server.config import load_config
from server.keys import known_digest
from tests.documents import ELSEWHERE, ROOT, Clone, blocks, commands, runnable
from tests.e2e.conftest import free_port, is_alive, pair, until

__all__ = ["pair"]

DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
ALL = [command for name in DOCUMENTS for block in blocks(name) for command in commands(block)]
# Run by a developer and by CI, this file among them: only what they name is checked.
GUARDS = re.compile(r"^\./scripts/(test|check|install)\b")
# Hours of work: whether the program knows every flag is checked.
SERVER_FLAGS = "--server-flags"  # of a load test: what follows is for the server
LONG = re.compile(r"^(\./scripts/distill-draft|\./scripts/train-tiny-pair|python -m benchmarks\.\w+)\b")
# They fetch gigabytes: that they exist is checked.
EXTERNAL = re.compile(r"^\.venv/bin/python -m (tests\.external\.\w+)$")


def answers(url: str, path: str) -> int:
    try:
        return httpx.get(url + path, timeout=5).status_code
    except httpx.TransportError:
        return 0


@contextmanager
def served(clone: Clone, command: str) -> Iterator[subprocess.Popen[bytes]]:
    """The server that the command starts, ready."""
    log = clone.folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=clone.folder,
            env=clone.environment,
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            until(lambda: process.poll() is not None or answers(clone.url, "/ready") == 200, 240)
            assert process.poll() is None, log.read_text()
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(45) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("command", sorted({each for each in ALL if GUARDS.match(each)}))
def test_scripts_and_the_tests_they_are_told_exist(command: str) -> None:
    script, *arguments = shlex.split(command)
    assert (ROOT / script).stat().st_mode & 0o111
    assert [each for each in arguments if "/" in each and not (ROOT / each).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({each for each in ALL if LONG.match(each)}))
def test_long_programs_know_their_flags(command: str, tmp_path: Path) -> None:
    program = LONG.match(command)
    assert program
    clone, words = Clone(tmp_path, free_port()), shlex.split(command)
    own = words[: words.index(SERVER_FLAGS)] if SERVER_FLAGS in words else words
    for asked, given in ((program[0], own), ("./scripts/serve", words[len(own) + 1 :])):
        flags = [each for each in given if each.startswith("--")]
        text = clone.run(f"{asked} --help") if flags else ""
        assert [flag for flag in flags if not re.search(rf"{flag}\b", text)] == []


def test_every_external_client_has_its_command() -> None:
    named = {found[1] for each in ALL if (found := EXTERNAL.match(each))}
    scripts = (ROOT / "tests" / "external").glob("with_*.py")
    assert named == {f"tests.external.{path.stem}" for path in scripts}


@pytest.mark.parametrize("command", sorted({each for each in ALL if "docker compose" in each}))
def test_compose_is_asked_for_services_that_exist(command: str) -> None:
    words = shlex.split(command)
    file = words[words.index("-f") + 1] if "-f" in words else "docker-compose.yml"
    services = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["services"]
    (verb,) = {"up", "run"} & set(words)
    named = [word for word in words[words.index(verb) + 1 :] if not word.startswith("-")]
    if verb == "run":  # one service, and what it is told
        assert len(named) > 1
        del named[1:]
    assert set(named) <= services.keys()


@pytest.mark.slow
def test_the_first_minute_of_the_readme(tmp_path: Path) -> None:
    """Its first command serves the embedded pair, its curl and its Python are answered."""
    first, ask, *_ = blocks("README.md")
    clone = Clone(tmp_path, free_port())
    with served(clone, commands(first)[0]):
        answer = json.loads(clone.run(ask))
        assert answer["choices"][0]["text"].strip()
        (program,) = blocks("README.md", "python")
        (tmp_path / "ask.py").write_text(clone.translate(program), encoding="utf-8")
        assert clone.run("python ask.py").strip()


@pytest.mark.slow
def test_the_readme_serves_a_pair_of_ones_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (command,) = [each for each in ALL if "path/or/hub-id-of-the-target" in each]
    target, draft = map(str, pair)
    command = command.replace("path/or/hub-id-of-the-target", target)
    command = command.replace("path/or/hub-id-of-the-draft", draft)
    clone = Clone(tmp_path, free_port())
    with served(clone, command):
        models = httpx.get(f"{clone.url}/v1/models").json()["data"]
        assert {model["id"] for model in models} == {target, draft}


@pytest.mark.slow
def test_docs_deployment(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in their order: keys are made, a bare server takes them, and ends."""
    settings = {"MMTAD_MODEL": str(pair[0]), "MMTAD_SPECULATIVE_CONFIG__MODEL": str(pair[1])}
    clone = Clone(tmp_path, free_port(), **settings)
    outputs: dict[str, str] = {}
    started, asked = False, []
    for block in map(runnable, blocks("docs/deployment.md")):
        if "curl" in block and not started:
            asked.append(block)  # it asks a server that Compose started
            continue
        outputs[block] = clone.run(block)
        if "nohup" in block:
            started = True
            until(lambda: answers(clone.url, "/ready") == 200, 120)
            (key,) = re.findall(r"your key: (\w+)", "".join(outputs.values()))
            pid = int((tmp_path / "server.pid").read_text())
            for each in asked:
                clone.run(each)
            assert answers(clone.url, "/v1/models") == 401
            models = httpx.get(f"{clone.url}/v1/models", headers={"authorization": f"Bearer {key}"})
            assert models.status_code == 200
    assert started
    until(lambda: not is_alive(pid), 45)
    assert "Traceback" not in (tmp_path / "server.log").read_text()

    for name, value in dotenv_values(tmp_path / ".env").items():
        monkeypatch.setenv(name, (value or "").replace("/run/keys/", f"{tmp_path}/deploy/keys/"))
    config = load_config([])
    assert known_digest(key.encode(), config.key_digests)
    assert config.has_draft


def test_no_command_is_left_out() -> None:
    """A new command of the documents is either run by a test above or falls under one of its rules."""
    run = {*blocks("README.md")[1:2], *blocks("docs/deployment.md")}
    known = {command for block in run for command in commands(block)}
    known |= {command for command in ALL if command.startswith("./scripts/serve")}
    rules = (GUARDS, LONG, EXTERNAL, ELSEWHERE)
    left = [each for each in ALL if each not in known and not any(rule.match(each) for rule in rules)]
    assert left == []
