"""Connections that never finish their headers are closed, others are left alone."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from server import protocol
from server.protocol import TimedProtocol

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def connect(monkeypatch: pytest.MonkeyPatch, seconds: float) -> AsyncIterator[Connection]:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", seconds)
    config = uvicorn.Config(slow_app, lifespan="off", log_config=None)
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: TimedProtocol(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost:", REQUEST[:-1]])
async def test_headers_that_never_end(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    async with connect(monkeypatch, 0.05) as (reader, writer):
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_a_trickle_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connect(monkeypatch, 0.1) as (reader, writer):
        end = asyncio.ensure_future(reader.read())
        for byte in REQUEST[:-2]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
            if end.done():
                break
        assert await asyncio.wait_for(end, 5) == b""


async def test_slow_answers_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice on one connection: the timer runs between requests only."""
    async with connect(monkeypatch, 0.1) as (reader, writer):
        for _ in range(2):
            writer.write(REQUEST)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(2) == b"ok"


async def test_what_is_not_http_is_told_in_openais_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connect(monkeypatch, 5) as (reader, writer):
        writer.write(b"nonsense\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
