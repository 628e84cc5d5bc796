"""Rows of bad input that take more than one request, a fault, or a clock to show."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from server.limits import HttpLimits
from tests.contract.cases import (
    SMALL,
    Behaviour,
    World,
    connect,
    exchange,
    parse_response,
    read_response,
    read_to_end,
)
from tests.e2e.conftest import START_SECONDS, RunningServer, until
from tests.e2e.tiny import byte_tokenizer
from tests.server.conftest import Served
from tests.server.test_bad_input import check_error

KEY = {"authorization": "Bearer the-key"}
KEYED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: %s\r\n"
    b"Content-Type: application/json\r\nContent-Length: 17\r\n\r\n"
    b'{"model": "tiny"}'
)
LONG = SMALL | {"max_tokens": 400, "ignore_eos": True, "stream": True}


def complete_post(fields: dict[str, Any]) -> bytes:
    """One whole HTTP request."""
    body = json.dumps(SMALL | fields).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def stream(
    client: httpx.Client, fields: dict[str, Any], headers: dict[str, str] | None = None
) -> Iterator[Iterator[str]]:
    """The lines of a stream after the first one, so it has begun; the client leaves at the end."""
    with client.stream("POST", "/v1/completions", json=fields, headers=headers) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def hold_still(world: World) -> None:
    """Row 13: headers that never end, silence, a body that never ends; with shorter clocks."""

    serve_port = world.serve_port

    async def answer(served: Served, sent: bytes) -> bytes:
        async with served.connect() as (reader, writer):
            writer.write(sent)
            return await asyncio.wait_for(reader.read(), 10)

    async def run() -> list[bytes]:
        limits = HttpLimits(header_seconds=0.2, body_seconds=0.2)
        async with serve_port(limits=limits) as served:
            post = complete_post({})
            return await asyncio.gather(*(answer(served, post[:size]) for size in (0, 60, len(post) - 5)))

    silent, headers, body = asyncio.run(run())
    assert silent == b""
    for received in (headers, body):
        response = parse_response(received)
        check_error(response, 408, "request_timeout", None)
        assert response.headers["connection"] == "close"


def take_nothing(world: World) -> None:
    """Row 56: the connection is dropped, others are served meanwhile; with a shorter clock.

    A whole answer is written at once, and waits in this process for its reader.
    """
    logs, serve_port = world.logs, world.serve_port
    asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3

    async def run() -> tuple[int, int]:
        async with serve_port(limits=HttpLimits(reader_seconds=0.1)) as served:
            for number in range(300):  # labels make a long page
                served.pool.metrics.worker_up.labels(f"{number}".ljust(10_000, "w")).set(1)
            async with served.connect() as (reader, writer):
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(asked)
                while "reader_too_slow" not in logs.getvalue():
                    assert (await served.complete()).status_code == 200
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                taken = await asyncio.wait_for(reader.read(), 10)
            return len(taken), len(served.pool.metrics.exposition())

    num_taken, num_page = asyncio.run(asyncio.wait_for(run(), 30))
    assert num_taken < 3 * num_page


def unknown_paths(world: World) -> None:
    """Row 15: an error object, one line in the log, no path in a label."""
    before = world.server.metric("mmtad_http_requests_total", route="other")
    paths = ("/nope", "/v1/%0d%0aSet-Cookie:x", "/v1/../etc/passwd", "/%2e%2e/%2e%2e/etc", "/" + "x" * 8192)
    lines = world.server.log.read_text().count('"route": "other"')
    for path in paths:
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        response = exchange(world.server, request.encode())
        check_error(response, 404, None, None)
        assert "set-cookie" not in response.headers
    assert world.server.metric("mmtad_http_requests_total", route="other") == before + len(paths)
    log = world.server.log.read_text()
    assert log.count('"route": "other"') == lines + len(paths)
    assert "Set-Cookie" not in log
    assert "passwd" not in log


def methods_name_what_is_allowed(world: World) -> None:
    """Row 14: the `Allow` header of the error."""
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert world.client.get(path).headers["allow"] == "POST"
    assert "GET" in world.client.post("/v1/models").headers["allow"]


def no_key(world: World) -> None:
    """Row 16."""
    with world.guarded.client() as client:
        response = client.post("/v1/completions", json=SMALL)
    message = check_error(response, 401, None, None)
    assert message.startswith("You didn't provide an API key")
    assert response.headers["www-authenticate"] == "Bearer"


def wrong_keys(world: World) -> None:
    """Row 17: Basic, and keys that are wrong, empty, not ASCII, 60 KB."""
    values = (b"Basic the-key", b"Bearer wrong", b"Bearer ", b"Bearer \xff\xfe", b"Bearer " + b"k" * 60_000)
    for value in values:
        response = exchange(world.guarded, KEYED % value)
        check_error(response, 401, "invalid_api_key", None)
        assert response.headers["www-authenticate"] == "Bearer"
    assert exchange(world.guarded, KEYED % b"Bearer the-key").status_code == 200


def wrong_key_with_a_large_body(world: World) -> None:
    """Row 18: answered and closed before a byte of the body was sent."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n"
        "Content-Type: application/json\r\nContent-Length: 100000000\r\n\r\n"
    )
    response = exchange(world.guarded, head.encode())
    check_error(response, 401, "invalid_api_key", None)
    assert response.headers["connection"] == "close"


def hidden_documents(world: World) -> None:
    """Row 19: served unless `--disable-fastapi-docs`; `/metrics` is open."""
    with world.guarded.client() as client:
        for path in ("/docs", "/openapi.json", "/redoc"):
            check_error(client.get(path, headers=KEY), 404, None, None)
        assert client.get("/metrics").status_code == 200
    assert world.client.get("/openapi.json").status_code == 200


def full_queue(world: World) -> None:
    """Row 52: at once, with whole seconds to wait."""
    with world.guarded.client() as client, stream(client, LONG, KEY), world.guarded.client() as other:
        started = time.perf_counter()
        response = other.post("/v1/completions", json=SMALL, headers=KEY)
        assert time.perf_counter() - started < 0.5
    check_error(response, 503, "queue_full", None)
    assert re.fullmatch(r"[1-9]\d*", response.headers["retry-after"])


def check_unavailable(server: RunningServer, code: str) -> None:
    with server.client() as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = client.post(path, json=SMALL)
            check_error(response, 503, code, None)
            assert int(response.headers["retry-after"]) >= 1
        check_error(client.get("/ready"), 503, code, None)
        assert client.get("/health").status_code == 200


def loading_and_draining(world: World) -> None:
    """Row 53; without a worker alive: see row 54."""
    with world.start(wait=False) as server:
        until(lambda: server.log.read_text().count("loading") > 0)
        check_unavailable(server, "model_loading")
        until(server.is_ready, START_SECONDS)
        (worker,) = server.workers()
        with server.client() as client, stream(client, LONG) as lines:
            os.kill(worker, signal.SIGSTOP)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: not server.is_ready())
            check_unavailable(server, "draining")
            os.kill(worker, signal.SIGCONT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0


def lost_worker(world: World) -> None:
    """Row 54: a stream that has begun is told; a request without a byte is retried once, then told."""
    server = world.server
    (worker,) = server.workers()
    with server.client() as client, stream(client, LONG) as lines, connect(server) as connection:
        os.kill(worker, signal.SIGSTOP)
        connection.sendall(complete_post({"max_tokens": 450, "n": 16, "ignore_eos": True}))
        with server.client() as other:
            other.get("/metrics")  # behind the request: by now it was sent to the worker
        os.kill(worker, signal.SIGKILL)
        rest = [line for line in lines if line]
        check_unavailable(server, "no_worker")
        until(server.is_ready, START_SECONDS)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        check_error(read_response(connection), 500, "worker_failed", None)
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "worker_failed")
    assert rest[-1] == "data: [DONE]"
    until(server.is_ready, START_SECONDS)


@contextlib.contextmanager
def aborted(server: RunningServer, number: int = 1) -> Iterator[None]:
    """What happens inside ends as `number` aborted requests, every row free again within 1 s."""
    before = server.metric("mmtad_requests_total", finish_reason="abort")
    yield
    until(lambda: server.metric("mmtad_requests_total", finish_reason="abort") == before + number, 1)
    assert is_idle(server)


def is_idle(server: RunningServer) -> bool:
    return all(
        server.metric(name) == 0
        for name in ("mmtad_requests_running", "mmtad_requests_waiting", "mmtad_kv_cache_usage_ratio")
    )


def leave_in_decode(world: World) -> None:
    """Row 55: with 8 choices, streamed and not; `tests/chaos` has the other stages."""
    for stream in (True, False):
        with aborted(world.server), connect(world.server) as connection:
            connection.sendall(complete_post(LONG | {"n": 8, "stream": stream}))
            until(lambda: world.server.metric("mmtad_requests_running") == 8)


def leave_at_the_last_token(world: World) -> None:
    """Row 55: the request is done, its client does not take the end."""
    with connect(world.server) as connection:
        connection.sendall(complete_post({"n": 8, "stream": True, "max_tokens": 1, "ignore_eos": True}))
        received = b""
        while received.count(b'"finish_reason":"length"') < 1:
            received += connection.recv(65_536)
    until(lambda: is_idle(world.server), 1)


def a_hundred_at_once(world: World) -> None:
    """Row 57: pipelined on one connection, answered in order."""
    sent = b"".join(complete_post({"max_tokens": number % 3}) for number in range(99))
    last = complete_post({"max_tokens": 2, "ignore_eos": True}).replace(
        b"Host: x", b"Host: x\r\nConnection: close"
    )
    with connect(world.server) as connection:
        connection.sendall(sent + last)
        received = read_to_end(connection)
    parts = received.split(b"HTTP/1.1 ")[1:]
    assert len(parts) == 100
    assert all(part.startswith(b"200") for part in parts)
    usages = [json.loads(part.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] for part in parts]
    assert all(usage <= number % 3 for number, usage in enumerate(usages[:-1]))
    assert usages[0] == 0
    assert usages[-1] == 2


def reuse_after_an_error(world: World) -> None:
    """Row 57: a connection that got a 400 serves the next request, or says that it closes."""
    with connect(world.server) as connection:
        connection.sendall(complete_post({"n": 0}))
        response = read_response(connection)
        check_error(response, 400, "integer_below_min_value", "n")
        if response.headers.get("connection") != "close":
            connection.sendall(complete_post({}))
            assert read_response(connection).status_code == 200


def reset_in_a_stream(world: World) -> None:
    """Row 57: as any other client that leaves."""
    with aborted(world.server), connect(world.server) as connection:
        connection.sendall(complete_post(LONG | {"n": 8}))
        assert connection.recv(1024)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stops_are_never_seen(world: World) -> None:
    """Row 47: a stop string across tokens, and across the bytes of a character, streamed and not."""
    bias = {str(token_id): 6 for token_id in {*_ids("\U0001f600"), *_ids("ab")}}
    asked = LONG | {"max_tokens": 64, "stream": False, "logit_bias": bias}
    text = world.client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    for stop in {text[start : start + 2] for start in range(4, len(text) - 2, 7)}:
        body = asked | {"stop": [stop]}
        whole = world.client.post("/v1/completions", json=body).json()["choices"][0]
        assert whole["text"] == text[: text.index(stop)]
        with world.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            events = response.read().decode().split("\n\n")[:-2]
        chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        assert chunks[-1]["stop_reason"] == stop


def _ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


STEPS: list[tuple[int, Callable[[World], None]]] = [
    (13, hold_still),
    (14, methods_name_what_is_allowed),
    (15, unknown_paths),
    (16, no_key),
    (17, wrong_keys),
    (18, wrong_key_with_a_large_body),
    (19, hidden_documents),
    (47, stops_are_never_seen),
    (52, full_queue),
    (53, loading_and_draining),
    (54, lost_worker),
    (55, leave_in_decode),
    (55, leave_at_the_last_token),
    (56, take_nothing),
    (57, a_hundred_at_once),
    (57, reuse_after_an_error),
    (57, reset_in_a_stream),
]
BEHAVIOURS = [Behaviour(row, run) for row, run in STEPS]
