"""Workers on two nodes of a real Ray cluster: one node is lost under load, another one joins."""

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ROOT, RunningServer, Start, clean_environment, until
from tests.e2e.tiny import write_model

pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmtad-server[ray]'")
pytestmark = pytest.mark.slow

NUM_REQUESTS = 64
GREEDY = {"stream": True, "temperature": 0, "ignore_eos": True}
NUM_TOKENS = 150
TOLD_SECONDS = 20.0  # ten times the goal
PLACED_SECONDS = 120.0
WORKERS = ("--worker-backend", "ray", "--num-workers", "2", "--device", "cpu")


@dataclass
class Nodes:
    """The hand on the nodes of a cluster."""

    process: "subprocess.Popen[str]"
    address: str

    def order(self, order: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == order.split()[0] + "\n"


@contextlib.contextmanager
def cluster(*cores: int) -> Iterator[Nodes]:
    command = [sys.executable, "-m", "tests.e2e.ray_cluster", *map(str, cores)]
    pipe = subprocess.PIPE
    # How many threads a worker has is up to Ray.
    environment = {name: value for name, value in clean_environment().items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        address = process.stdout.readline().strip()
        assert address
        try:
            yield Nodes(process, address)
        finally:
            process.stdin.close()
            assert process.wait(60) == 0


@dataclass
class Answer:
    """What one client saw; `ended` in monotonic seconds."""

    text: str
    error: str | None
    ended: float


def events(response: httpx.Response) -> Iterator[bytes]:
    """`iter_lines` would also end a line where the text holds one of Unicode's own ends."""
    rest = b""
    for data in response.iter_bytes():
        *whole, rest = (rest + data).split(b"\n\n")
        yield from whole


def ask(server: RunningServer, number: int, begun: "threading.Semaphore | None" = None) -> Answer:
    # The target alone: with a draft the shape of a step, and so the text, may follow the load.
    body = {"model": "tiny", "prompt": f"x{number}", "speculative": False, "max_tokens": NUM_TOKENS}
    text, error = "", None
    with (
        server.client(180) as client,
        client.stream("POST", "/v1/completions", json={**body, **GREEDY}) as response,
    ):
        assert response.status_code == 200
        for line in events(response):
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                error = event["error"]["code"] if "error" in event else error
                text += "".join(choice["text"] for choice in event.get("choices", ()))
                if begun is not None:
                    begun.release()
                    begun = None
    return Answer(text, error, time.monotonic())


def ask_all(server: RunningServer) -> tuple[list[Answer], float]:
    """The answers to all requests at once, and how long they took."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(NUM_REQUESTS) as executor:
        answers = list(executor.map(lambda number: ask(server, number), range(NUM_REQUESTS)))
    return answers, time.monotonic() - started


def num_up(server: RunningServer) -> float:
    return server.metric("mmtad_worker_up")


@pytest.fixture
def large_target(tmp_path: Path) -> str:
    """So large that the workers, and not the clients, take the time: 28 million parameters."""
    return str(write_model(tmp_path / "target", seed=0, layers=12, hidden=512))


def test_a_node_is_lost_and_another_one_joins(start: Start, large_target: str) -> None:
    flags = (*WORKERS, "--max-num-seqs", "32", "--model", large_target)
    with cluster(1, 1) as nodes, start(*flags, "--ray-address", nodes.address) as server:
        until(lambda: num_up(server) == 2, PLACED_SECONDS)
        whole, seconds_before = ask_all(server)
        assert [answer.error for answer in whole] == [None] * NUM_REQUESTS

        begun = threading.Semaphore(0)
        with concurrent.futures.ThreadPoolExecutor(NUM_REQUESTS) as executor:
            asked = [executor.submit(ask, server, number, begun) for number in range(NUM_REQUESTS)]
            for _ in range(NUM_REQUESTS):
                assert begun.acquire(timeout=60)
            removed = time.monotonic()
            nodes.order("remove")
            until(lambda: num_up(server) == 1)
            seen = time.monotonic()
            answers = [each.result() for each in asked]
        told = [answer for answer in answers if answer.error is not None]
        assert {answer.error for answer in told} == {"worker_failed"}
        # Half of them were on that node; what had ended before the loss was seen was answered.
        assert 0 < len(told) <= NUM_REQUESTS / 2
        assert [
            a.text for a, b in zip(answers, whole, strict=True) if a.error is None and a.text != b.text
        ] == []
        assert max(answer.ended for answer in told) - seen < TOLD_SECONDS

        _, seconds_without = ask_all(server)
        nodes.order("add 1")
        until(lambda: num_up(server) == 2, PLACED_SECONDS)
        again, seconds_after = ask_all(server)
        assert [answer.text for answer in again] == [answer.text for answer in whole]
        sys.stdout.write(
            f"\n{NUM_REQUESTS} requests: {seconds_before:.1f} s on two nodes, "
            f"{seconds_without:.1f} s on one, {seconds_after:.1f} s with a new one; "
            f"loss seen after {seen - removed:.2f} s, "
            f"told {max(answer.ended for answer in told) - seen:.2f} s later\n"
        )
        assert server.stop() == 0


def test_nodes_may_come_after_the_server(start: Start) -> None:
    with cluster() as nodes, start(*WORKERS, "--ray-address", nodes.address, wait=False) as server:
        until(lambda: "no node has a core so far" in server.log.read_text(), PLACED_SECONDS)
        for _ in range(2):
            nodes.order("add 2")
        until(server.is_ready, PLACED_SECONDS)
        until(lambda: num_up(server) == 2, PLACED_SECONDS)
        assert "cpu, 2 threads" in server.log.read_text(), "each has a node of its own, whole"
        assert server.stop() == 0


def test_without_a_cluster_the_server_says_so(start: Start) -> None:
    flags = ("--worker-backend", "ray", "--ray-address", "127.0.0.1:9")
    with start(*flags, wait=False) as server:
        assert server.process.wait(60) == 1
        (line,) = [line for line in server.log.read_text().splitlines() if line.startswith("error: ")]
        assert line.startswith("error: --ray-address 127.0.0.1:9: this machine is no node of such a cluster")
