"""A target over two processes behind a real server: its texts, its sockets, and the death of either."""

import json
import os
import signal
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import RunningServer, Start, is_alive, until
from tests.e2e.random_requests import METHODS

pytestmark = pytest.mark.slow

LOAD_SECONDS = 120.0
FLAGS = ("--dtype", "float32", "--no-speculative-config.adaptive")  # no costs to be measured


def texts(server: RunningServer) -> dict[str, str]:
    """Of every method, greedy and sampled."""
    found = {}
    with server.client() as client:
        for method in METHODS:
            for temperature in (0, 1):
                fields = {"temperature": temperature, "seed": 1, "ignore_eos": True}
                body = {"model": "tiny", "prompt": "x", "max_tokens": 12, "speculative": {"method": method}}
                response = client.post("/v1/completions", json=body | fields)
                assert response.status_code == 200, response.text
                found[f"{method} {temperature}"] = response.json()["choices"][0]["text"]
    return found


def follower(server: RunningServer) -> psutil.Process:
    (worker,) = server.workers()
    (child,) = psutil.Process(worker).children()
    return child


def addresses(pid: int) -> set[str]:
    """Where a process listens, and with whom it speaks."""
    connections = psutil.Process(pid).net_connections(kind="inet")
    return {place.ip for each in connections for place in (each.laddr, each.raddr) if place}


def lose(server: RunningServer, rank: int) -> list[dict[str, Any]]:
    """The last events of a stream whose worker loses a rank."""
    lines = []
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line and not lines:
                os.kill(rank, signal.SIGKILL)
            lines += [line] if line else []
    assert lines[-1] == "data: [DONE]"
    events: list[dict[str, Any]] = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return events


def test_two_ranks_serve_as_one_and_end_as_one(start: Start) -> None:
    with start(*FLAGS) as one:
        expected = texts(one)
        assert one.stop() == 0
    with start(*FLAGS, "--tensor-parallel-size", "2") as split:
        assert "over 2 ranks" in split.log.read_text()
        assert texts(split) == expected
        worker, rank = split.workers()[0], follower(split)
        assert addresses(worker) | addresses(rank.pid) == {"127.0.0.1"}
        assert lose(split, rank.pid)[-1]["error"]["code"] == "worker_failed"
        until(lambda: not is_alive(worker))
        assert split.metric("mmtad_worker_restarts_total") == 1
        until(split.is_ready, LOAD_SECONDS)
        assert texts(split) == expected
        processes = [split.workers()[0], follower(split).pid]
        assert rank.pid not in processes
        assert split.stop() == 0
        until(lambda: not any(map(is_alive, processes)))
