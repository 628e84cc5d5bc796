"""A target over two processes behind a real server: its texts, its sockets, and the death of either."""

import json
import os
import signal
import time
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import RunningServer, Start, is_alive, until
from tests.e2e.random_requests import METHODS

pytestmark = pytest.mark.slow

LOAD_SECONDS = 120.0
TOLD_SECONDS = 10.0  # ten times the goal
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


def lose(server: RunningServer, rank: int) -> tuple[dict[str, Any], float]:
    """The last event of a stream whose worker loses a rank, and the seconds until then."""
    lines: list[str] = []
    killed = 0.0
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line and not lines:
                os.kill(rank, signal.SIGKILL)
                killed = time.monotonic()
            lines += [line] if line else []
    assert lines[-1] == "data: [DONE]"
    return json.loads(lines[-2].removeprefix("data: ")), time.monotonic() - killed


def test_two_ranks_serve_as_one_and_end_as_one(start: Start, record_property: Any) -> None:
    with start(*FLAGS) as one:
        expected = texts(one)
        assert one.stop() == 0
    with start(*FLAGS, "--tensor-parallel-size", "2") as split:
        assert "over 2 ranks" in split.log.read_text()
        assert texts(split) == expected
        worker, rank = split.workers()[0], follower(split)
        assert addresses(worker) | addresses(rank.pid) == {"127.0.0.1"}
        last, seconds = lose(split, rank.pid)
        record_property("told of the death of rank 1 after seconds", round(seconds, 2))
        assert last["error"]["code"] == "worker_failed"
        assert seconds < TOLD_SECONDS
        until(lambda: not is_alive(worker))
        assert split.metric("mmtad_worker_restarts_total") == 1
        until(split.is_ready, LOAD_SECONDS)
        assert texts(split) == expected
        processes = [split.workers()[0], follower(split).pid]
        assert rank.pid not in processes
        assert split.stop() == 0
        until(lambda: not any(map(is_alive, processes)))
