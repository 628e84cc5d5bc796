"""The end of a server in five situations: its exit code, how long it takes, and that no process is left.

The long form ends twenty servers in each.
"""

import concurrent.futures
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.conftest import RunningServer, Start, is_alive, until
from tests.e2e.events import end_of_stream

pytestmark = pytest.mark.slow

CEILING = 10  # times the goal
DRAIN_SECONDS = 2.0
NUM_STREAMS = 32
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}

Situation = Callable[[Start], float]


def seconds_to_end(server: RunningServer, number: int, exit_code: int, goal: float) -> float:
    """From this signal to the exit; with the process all of its workers must be gone."""
    workers = server.workers()
    started = time.monotonic()
    assert server.stop(number, CEILING * goal) == exit_code
    seconds = time.monotonic() - started
    assert not any(map(is_alive, workers))
    return seconds


def ended(server: RunningServer) -> str:
    with server.client(120) as client:
        return end_of_stream(client.post("/v1/completions", json=BODY))


def num_accepted(server: RunningServer) -> float:
    return server.metric("mmtad_requests_running") + server.metric("mmtad_requests_waiting")


def idle(start: Start) -> float:
    with start() as server:
        return seconds_to_end(server, signal.SIGTERM, 0, goal=2)


def under_load(start: Start) -> float:
    """More streams than can end in time: some end, the others are told."""
    with (
        start("--shutdown-timeout", str(DRAIN_SECONDS)) as server,
        concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as executor,
    ):
        ends = [executor.submit(ended, server) for _ in range(NUM_STREAMS)]
        until(lambda: num_accepted(server) == NUM_STREAMS)
        seconds = seconds_to_end(server, signal.SIGTERM, 0, goal=DRAIN_SECONDS + 2)
        assert {end.result() for end in ends} <= {"length", "draining"}
    return seconds


def while_loading(start: Start) -> float:
    with start(wait=False) as server:
        until(lambda: server.log.read_text().count("loading") > 0)
        with server.client() as client:
            assert client.get("/health").status_code == 200
            answer = client.get("/ready")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        return seconds_to_end(server, signal.SIGTERM, 0, goal=5)


@contextmanager
def one_stream(server: RunningServer) -> Iterator[None]:
    with server.client() as client, client.stream("POST", "/v1/completions", json=BODY) as response:
        lines = response.iter_lines()  # kept: the response is closed with its iterator
        next(lines)
        yield


def second_signal(start: Start) -> float:
    with start() as server, one_stream(server):
        server.process.send_signal(signal.SIGINT)
        until(lambda: not server.is_ready())
        return seconds_to_end(server, signal.SIGINT, 1, goal=2)


def killed(start: Start) -> float:
    """Its workers see the end of their link."""
    with start() as server, one_stream(server):
        workers = server.workers()
        started = time.monotonic()
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        until(lambda: not any(map(is_alive, workers)), CEILING * 5)
        return time.monotonic() - started


@pytest.mark.parametrize("situation", [idle, under_load, while_loading, second_signal, killed])
def test_shutdown(situation: Situation, start: Start, long: bool, record_property: Any) -> None:
    seconds = [situation(start) for _ in range(20 if long else 1)]
    record_property("seconds to the end, at most", round(max(seconds), 2))
