"""Servers whose workers fail on order, and the hand on their faults."""

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.worker import FAULTS
from tests.e2e.conftest import RunningServer, Start, free_port, launch, pair, running_server, serving, start

__all__ = ["pair", "start"]


class Control:
    """The hand of a test on one worker process."""

    def __init__(self, folder: Path, pid: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(folder / f"{pid}.sock"))
        self._lines = self._socket.makefile("rw")

    def ask(self, order: str) -> dict[str, Any]:
        self._lines.write(json.dumps(order) + "\n")
        self._lines.flush()
        reply: dict[str, Any] = json.loads(self._lines.readline())
        assert "broken" not in reply, reply
        return reply

    def status(self) -> dict[str, Any]:
        """Rows and steps; asserts the engine's integrity. Only while steps are held or nothing runs."""
        return self.ask("status")

    def received(self, name: str) -> int:
        count: int = self.ask("count")["received"].get(name, 0)
        return count

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass
class ChaosServer(RunningServer):
    folder: Path

    def order(self, **faults: Any) -> None:
        """These faults and no others, from the next step of any worker on."""
        draft = self.folder / "faults.new"
        draft.write_text(json.dumps(faults))
        draft.rename(self.folder / FAULTS)

    @contextlib.contextmanager
    def control(self, pid: int | None = None) -> Iterator[Control]:
        control = Control(self.folder, pid or self.workers()[0])
        try:
            yield control
        finally:
            control.close()

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = (line for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]


@pytest.fixture(scope="session")
def calm(start: Start) -> Iterator[RunningServer]:
    """One server without faults for the tests that leave it as it was; ends cleanly."""
    with start() as running:
        yield running
        assert running.stop() == 0


StartChaos = Callable[..., AbstractContextManager[ChaosServer]]


@pytest.fixture(scope="session")
def start_chaos(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> StartChaos:
    """`with start_chaos(*flags, wait=True, **faults) as server`: the tiny pair with faults on order."""

    @contextlib.contextmanager
    def run(*flags: str, wait: bool = True, **faults: Any) -> Iterator[ChaosServer]:
        port, folder = free_port(), tmp_path_factory.mktemp("chaos")
        log, program = folder / "log", ("tests.chaos.server", str(folder))
        with log.open("wb") as output, launch([*serving(pair, port), *flags], output, program) as process:
            server = ChaosServer(process, port, log, folder)
            server.order(**faults)
            with running_server(server, wait=wait):
                yield server

    return run
