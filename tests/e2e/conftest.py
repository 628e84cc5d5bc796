"""A server as users start it, with a tiny random pair, on a free port."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.tiny import write_pair

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 120.0


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Polls a condition; fails when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie is not: its parent may be gone, too."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@dataclass
class RunningServer:
    """One server process, its client, and what can be seen of it from outside."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, seconds: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=seconds)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with self.client(5) as client:
                return client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the samples of that name that have these labels."""
        with self.client() as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        matching = (s for s in samples if s.name == name and labels.items() <= s.labels.items())
        return sum(sample.value for sample in matching)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 45.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


Server = TypeVar("Server", bound=RunningServer)
Process = subprocess.Popen[bytes]
Start = Callable[..., AbstractContextManager[RunningServer]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """This process's, without settings of the server."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MMTAD_")}
    return environment | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def launch(arguments: list[str], output: IO[bytes], program: Sequence[str] = ("server",)) -> Process:
    command = [sys.executable, "-m", *program, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=output, stderr=subprocess.STDOUT
    )


def serving(pair: tuple[Path, Path], port: int) -> list[str]:
    """Flags that serve a pair as `tiny` on a port."""
    names = ["--model", str(pair[0]), "--speculative-config.model", str(pair[1])]
    return [*names, "--served-model-name", "tiny", "--port", str(port)]


@contextlib.contextmanager
def running_server(server: Server, *, wait: bool) -> Iterator[Server]:
    """The server while the context lasts, by default once it is ready."""
    try:
        if wait:
            until(server.is_ready, START_SECONDS)
        yield server
    finally:
        server.process.kill()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def start(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`with start(*flags, wait=True) as server`: serves the tiny pair as `tiny` and `tiny-draft`."""

    @contextlib.contextmanager
    def run(*flags: str, wait: bool = True) -> Iterator[RunningServer]:
        port = free_port()
        log = tmp_path_factory.mktemp("server") / "log"
        with (
            log.open("wb") as output,
            launch([*serving(pair, port), *flags], output) as process,
            running_server(RunningServer(process, port, log), wait=wait) as server,
        ):
            yield server

    return run


@pytest.fixture(scope="module")
def server(start: Start) -> Iterator[RunningServer]:
    """One server for the tests of a module that do not harm it; ends cleanly."""
    with start() as running:
        yield running
        workers = running.workers()
        assert running.stop() == 0
        assert not any(map(is_alive, workers))
