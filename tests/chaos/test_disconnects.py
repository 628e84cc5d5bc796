"""A client that leaves, at six stages of its request: its rows and its state are free within one step."""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.conftest import ChaosServer, Control, StartChaos
from tests.e2e.conftest import until

pytestmark = pytest.mark.slow

ROWS = 4
QUEUE = 4
LONG_PROMPT = "x" * 400  # more than one chunk of prefill, behind a number: prefills are shared
RESET = struct.pack("ii", 1, 0)
STAGES = ("body", "queued", "prefill", "first step", "mid stream", "JSON")


class Client:
    """A request on a raw connection that can be closed, or reset, at any moment."""

    def __init__(self, server: ChaosServer, *, part: float = 1.0, **fields: Any) -> None:
        # Greedy: a sampled text may begin with many bytes that are no character yet, so with no event.
        content = {"model": "tiny", "prompt": "x", "max_tokens": 64, "ignore_eos": True, "temperature": 0}
        body = json.dumps(content | fields).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        )
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self.socket.sendall(head.encode())
        assert self.socket.recv(1024).startswith(b"HTTP/1.1 100"), "the server waits for the body"
        self.socket.sendall(body[: int(part * len(body))])

    def wait_for_text(self) -> None:
        received = b""
        while b"data: {" not in received:
            received += self.socket.recv(4096)

    def leave(self, *, reset: bool) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()


class Scene:
    """One server whose steps the test makes."""

    def __init__(self, server: ChaosServer, control: Control) -> None:
        self.server = server
        self.control = control
        control.ask("hold")

    def send(self, **fields: Any) -> Client:
        """A request that the worker has, held before its next step."""
        before = self.control.received("GenerateCommand")
        client = Client(self.server, **fields)
        until(lambda: self.control.received("GenerateCommand") == before + 1)
        return client

    def step(self, count: int = 1) -> dict[str, Any]:
        for _ in range(count):
            status = self.control.ask("step")
        return status

    def leave(self, client: Client, *, reset: bool) -> None:
        """Go, and see the worker told; it is in a step that has not ended."""
        until(lambda: bool(self.control.status()["has_work"]))  # received is not yet taken up
        before = self.control.received("CancelCommand")
        client.leave(reset=reset)
        until(lambda: self.control.received("CancelCommand") == before + 1)

    def ended(self, reason: str) -> float:
        return self.server.metric("mmtad_requests_total", finish_reason=reason)

    def unanswered(self) -> float:
        return self.server.metric("mmtad_http_requests_total", route="/v1/completions", status="499")

    def at(self, stage: str, n: int) -> Client:
        """A request that has come as far as `stage`."""
        if stage == "prefill":
            client = self.send(prompt=f"{self.ended('abort')}{LONG_PROMPT}", n=n, stream=True)
            self.step()
            status = self.control.status()
            assert (status["running"], status["waiting"]) == (0, n)
        elif stage == "mid stream":
            client = self.send(n=n, stream=True)
            self.step(3)
            client.wait_for_text()
            assert self.control.status()["running"] == n
        else:
            client = self.send(n=n, stream=stage == "first step")
            if stage == "JSON":
                self.step(3)
        return client

    def leave_at(self, stage: str, n: int, *, reset: bool) -> None:
        aborted = self.ended("abort")
        client = self.at(stage, n)
        before = self.control.ask("count")["steps"]
        self.leave(client, reset=reset)
        self.step()
        until(lambda: self.ended("abort") == aborted + 1)
        assert self.server.metric("mmtad_requests_running") == 0
        self.assert_free()
        assert self.control.ask("count")["steps"] == before + 1

    def leave_in_the_queue(self, n: int, *, reset: bool) -> None:
        """All rows are taken by another request, which goes on."""
        aborted = self.ended("abort")
        other = self.send(n=ROWS, stream=True)
        client = self.send(n=n)
        self.step()
        status = self.control.status()
        assert (status["running"], status["waiting"]) == (ROWS, n)
        self.leave(client, reset=reset)
        self.step()
        status = self.control.status()
        assert (status["running"], status["waiting"]) == (ROWS, 0)
        self.leave(other, reset=reset)
        self.step()
        until(lambda: self.ended("abort") == aborted + 2)
        self.assert_free()

    def leave_in_the_body(self, *, reset: bool) -> None:
        before = self.unanswered()
        Client(self.server, part=0.5).leave(reset=reset)
        until(lambda: self.unanswered() == before + 1)
        self.assert_free()

    def assert_free(self) -> None:
        status = self.control.status()
        assert (status["running"], status["waiting"], status["free_rows"]) == (0, 0, ROWS)


@pytest.fixture(scope="module")
def scene(start_chaos: StartChaos) -> Iterator[Scene]:
    flags = ("--max-num-seqs", str(ROWS), "--max-num-queued-reqs", str(QUEUE))
    with start_chaos(*flags) as server, server.control() as control:
        yield Scene(server, control)
        control.ask("open")
        assert server.stop() == 0


@pytest.mark.parametrize("stage", STAGES)
def test_leaving_frees_everything(scene: Scene, stage: str, long: bool) -> None:
    repeats = 100 if long else 20
    failed = scene.ended("error")
    for number in range(repeats):
        n = ROWS if number % 2 else 1
        reset = number % 4 >= 2
        if stage == "body":
            scene.leave_in_the_body(reset=reset)
        elif stage == "queued":
            scene.leave_in_the_queue(n, reset=reset)
        else:
            scene.leave_at(stage, n, reset=reset)
    assert scene.ended("error") == failed
    # More rounds than slots: any that was kept would be missed now.
    assert repeats > ROWS + QUEUE
    scene.control.ask("open")
    with scene.server.client() as client:
        body = {"model": "tiny", "prompt": "x", "n": ROWS, "max_tokens": 4, "ignore_eos": True}
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 4 * ROWS
    assert scene.server.metric("mmtad_requests_running") == 0
    scene.control.ask("hold")
