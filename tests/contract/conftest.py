"""Real server processes over the tiny random pair, shared by all tests of the contract."""

from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import RunningServer, Start, pair, start
from tests.server.conftest import logs, make, serve_port

__all__ = ["logs", "make", "pair", "serve_port", "start"]  # fixtures

KEY = "the-key"


@pytest.fixture(scope="session")
def server(start: Start) -> Iterator[RunningServer]:
    """The server of every case that needs no flags of its own; ends cleanly."""
    with start() as running:
        yield running
        assert running.metric("mmtad_requests_running") == 0
        assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


@pytest.fixture(scope="session")
def guarded(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Asks for a key, has room for one sequence and hides its documents."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    flags = ("--api-key-file", str(keys), "--disable-fastapi-docs")
    with start(*flags, "--max-num-seqs", "1", "--max-num-queued-reqs", "0") as running:
        yield running
        assert running.stop() == 0
