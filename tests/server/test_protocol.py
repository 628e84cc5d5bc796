"""Through real sockets: who holds still is dropped, others are left alone, nothing is read in vain."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.limits import HttpLimits
from tests.server.conftest import Serve, Served
from tests.server.fakes import ScriptedEngine, until

REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SECONDS = 10.0

Answer = tuple[bytes, dict[str, Any]]


async def answer_of(reader: asyncio.StreamReader) -> Answer:
    """The head of the only answer of a connection, which the server closes, and its body."""
    head, _, body = (await asyncio.wait_for(reader.read(), SECONDS)).partition(b"\r\n\r\n")
    return head, json.loads(body)["error"]


def rejected(served: Served, reason: str) -> float | None:
    return served.metric("mmtad_requests_rejected_total", reason=reason)


@pytest.fixture
async def hasty(serve_port: Serve) -> AsyncIterator[Served]:
    async with serve_port(limits=HttpLimits(header_seconds=0.1, body_seconds=0.1)) as served:
        yield served


async def test_a_silent_connection_is_closed(hasty: Served) -> None:
    async with hasty.connect() as (reader, _):
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    assert rejected(hasty, "request_timeout") is None


@pytest.mark.parametrize("sent", [b"G", b"GET / HTTP/1.1\r\nHost:", REQUEST[:-1]])
async def test_headers_that_never_end(hasty: Served, sent: bytes) -> None:
    async with hasty.connect() as (reader, writer):
        writer.write(sent)
        head, error = await answer_of(reader)
    assert head.startswith(b"HTTP/1.1 408")
    assert error["code"] == "request_timeout"
    assert rejected(hasty, "request_timeout") == 1


async def test_a_trickle_does_not_help(hasty: Served) -> None:
    async with hasty.connect() as (reader, writer):
        answer = asyncio.ensure_future(answer_of(reader))
        for byte in REQUEST[:-2]:
            writer.write(bytes([byte]))
            await asyncio.wait({answer}, timeout=0.01)
            if answer.done():
                break
        head, _ = await answer
    assert head.startswith(b"HTTP/1.1 408")


async def test_the_next_headers_have_their_time_too(hasty: Served) -> None:
    async with hasty.connect() as (reader, writer):
        writer.write(REQUEST + REQUEST[:-2])
        first = await asyncio.wait_for(reader.readuntil(b'{"status":"ok"}'), SECONDS)
        assert first.startswith(b"HTTP/1.1 200")
        head, _ = await answer_of(reader)
    assert head.startswith(b"HTTP/1.1 408")


async def test_slow_answers_are_not_cut(serve_port: Serve) -> None:
    """A connection that began later and says nothing is closed while the answer is still awaited."""
    engine = ScriptedEngine()
    engine.gate.clear()
    body = b'{"model": "tiny", "max_tokens": 1}'
    limits = HttpLimits(header_seconds=0.1, reader_seconds=0.1)
    async with serve_port(engine, limits=limits) as served, served.connect() as (reader, writer):
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: served.pool._reserved.num_slots == 1)
        for _ in range(2):
            async with served.connect() as (silent, _):
                assert await asyncio.wait_for(silent.read(), SECONDS) == b""
        engine.gate.set()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
    assert head.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_body_that_never_ends(hasty: Served, framing: bytes) -> None:
    async with hasty.connect() as (reader, writer):
        writer.write(POST + framing + b"\r\n1\r\n{\r\n")
        head, error = await answer_of(reader)
    assert head.startswith(b"HTTP/1.1 408")
    assert error["code"] == "request_timeout"
    assert rejected(hasty, "request_timeout") == 1
    assert hasty.pool._reserved.num_slots == 0


async def test_bytes_are_counted_as_they_arrive(serve_port: Serve) -> None:
    """The body would never end: the answer comes once it is too large."""
    async with serve_port(limits=HttpLimits(body_bytes=1000)) as served:
        async with served.connect() as (reader, writer):
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b" " * 1001)
            head, error = await answer_of(reader)
        assert head.startswith(b"HTTP/1.1 413")
        assert error["code"] == "content_too_large"
        assert rejected(served, "content_too_large") == 1


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain", b"415"),
        (b"POST /nope HTTP/1.1", b"404"),
        (b"PUT /v1/completions HTTP/1.1", b"405"),
        (b"GET /health HTTP/1.1", b"200"),
    ],
)
async def test_an_answer_before_the_body_ends_the_connection(
    serve_port: Serve, request_line: bytes, status: bytes
) -> None:
    async with serve_port() as served, served.connect() as (reader, writer):
        writer.write(request_line + b"\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = await asyncio.wait_for(reader.read(), SECONDS)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"connection: close" in answer


@pytest.mark.parametrize("size", [40_000, 900_000])
async def test_an_answer_before_the_body_is_not_lost_with_it(serve_port: Serve, size: int) -> None:
    """A connection that is closed over unread bytes is reset, and what was sent may be gone."""
    sent = POST.replace(b"application/json", b"text/plain") + b"Content-Length: %d\r\n\r\n" % size
    async with serve_port() as served:
        for _ in range(10):
            async with served.connect() as (reader, writer):
                writer.write(sent + b"x" * size)
                await writer.drain()
                head, error = await answer_of(reader)
            assert head.startswith(b"HTTP/1.1 415")
            assert error["code"] == "unsupported_media_type"


async def test_no_key_is_told_before_the_body_comes(serve_port: Serve) -> None:
    async with serve_port(api_key=["the-key"]) as served:
        for given, reason in ((b"", "http_401"), (b"Authorization: Bearer x\r\n", "invalid_api_key")):
            async with served.connect() as (reader, writer):
                writer.write(POST + given + b"Content-Length: 100000000\r\n\r\n")
                head, _ = await answer_of(reader)
            assert head.startswith(b"HTTP/1.1 401")
            assert rejected(served, reason) == 1
        assert served.pool._reserved.num_slots == 0


async def test_expected_bodies_are_only_asked_for_with_a_key(serve_port: Serve) -> None:
    body = b'{"model": "tiny", "max_tokens": 1}'
    asking = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(body)
    async with serve_port(api_key=["the-key"]) as served:
        async with served.connect() as (reader, writer):
            writer.write(asking + b"\r\n")
            head, _ = await answer_of(reader)
            assert head.startswith(b"HTTP/1.1 401")
        async with served.connect() as (reader, writer):
            writer.write(asking + b"Authorization: Bearer the-key\r\n\r\n")
            assert (await asyncio.wait_for(reader.readline(), SECONDS)).startswith(b"HTTP/1.1 100")
            writer.write(body)
            rest = await asyncio.wait_for(reader.readuntil(b"system_fingerprint"), SECONDS)
            assert b"HTTP/1.1 200" in rest


@pytest.mark.parametrize("ended", [False, True])
async def test_headers_that_are_too_large(serve_port: Serve, ended: bool) -> None:
    async with serve_port() as served:
        async with served.connect() as (reader, writer):
            writer.write(REQUEST[:-2] + b"X-Huge: " + b"x" * 65_536 + (b"\r\n\r\n" if ended else b""))
            head, error = await answer_of(reader)
        assert head.startswith(b"HTTP/1.1 431")
        assert b"x-request-id: " in head
        assert error["type"] == "invalid_request_error"
        assert rejected(served, "http_431") == 1
        assert served.metric("mmtad_http_requests_total", route="other", status="431") == 1


async def test_what_is_not_http_is_told_in_openais_shape(serve_port: Serve) -> None:
    async with serve_port() as served:
        async with served.connect() as (reader, writer):
            writer.write(b"nonsense\r\n\r\n")
            head, error = await answer_of(reader)
        assert head.startswith(b"HTTP/1.1 400")
        assert set(error) == {"message", "type", "param", "code"}
        assert rejected(served, "http_400") == 1


async def test_pipelined_requests_are_answered_in_order(serve_port: Serve) -> None:
    async with serve_port() as served, served.connect() as (reader, writer):
        paths = [b"/health", b"/version", b"/nope"] * 33 + [b"/health"]
        requests = [REQUEST.replace(b"/health", path) for path in paths]
        requests[-1] = requests[-1].replace(b"Host", b"Connection: close\r\nHost")
        writer.write(b"".join(requests))
        answers = (await asyncio.wait_for(reader.read(), SECONDS)).split(b"HTTP/1.1 ")[1:]
    statuses = [answer[:3] for answer in answers]
    assert statuses == [b"404" if path == b"/nope" else b"200" for path in paths]
