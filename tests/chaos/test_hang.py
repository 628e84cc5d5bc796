"""A worker that stands still: found by its missing steps, told to its victim and to nobody else, replaced."""

import concurrent.futures
import os
import signal
import time
from typing import Any

import pytest

from tests.chaos.conftest import StartChaos
from tests.e2e.conftest import RunningServer, until
from tests.e2e.events import end_of_stream

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = {False: 6.0, True: 30.0}  # --worker-timeout of the short and the long form
CEILING = 10.0  # times the goal: the timeout and 5 s
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}


def ended(server: RunningServer) -> tuple[str, float]:
    """How a stream ended, and when."""
    with server.client(600) as client:
        response = client.post("/v1/completions", json=BODY)
    return end_of_stream(response), time.monotonic()


def test_a_worker_that_stands_still_is_replaced(
    start_chaos: StartChaos, long: bool, record_property: Any
) -> None:
    timeout = TIMEOUT_SECONDS[long]
    flags = ("--num-workers", "2", "--worker-timeout", str(timeout))
    with start_chaos(*flags) as server, concurrent.futures.ThreadPoolExecutor(2) as executor:
        until(lambda: server.metric("mmtad_worker_up") == 2, 120)
        streams = [executor.submit(ended, server) for _ in range(2)]  # placed by free rows: one on each
        until(lambda: server.metric("mmtad_requests_running") == 2)
        victim = server.workers()[0]
        stopped = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        ends = dict(stream.result() for stream in streams)
        until(lambda: server.metric("mmtad_worker_up") == 2, CEILING * (timeout + 5))
        replaced = time.monotonic() - stopped
        told = ends["worker_failed"] - stopped
        record_property("victim told after s", round(told, 1))
        record_property("replaced after s", round(replaced, 1))
        assert ends.keys() == {"worker_failed", "length"}
        assert timeout <= told <= CEILING * (timeout + 5)
        assert len(server.logged("worker_stuck")) == 1
        assert victim not in server.workers()
        assert ended(server)[0] == "length"
        assert server.stop() == 0
