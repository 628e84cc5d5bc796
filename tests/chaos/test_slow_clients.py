"""Clients that send a byte a second or take nothing: closed in time, and nobody waits for them.

The short form leaves out those that take nothing, which are held for half a minute.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from benchmarks.loop_lag import quantile
from server.limits import HttpLimits
from tests.chaos.conftest import ChaosServer, StartChaos
from tests.chaos.footprint import num_connections
from tests.chaos.slow_proxy import SlowProxy
from tests.e2e.conftest import until

pytestmark = pytest.mark.slow

LIMITS = HttpLimits()
CLOSED_CEILING = 10.0  # times the limit
RATIO_CEILING = 12.0  # ten times the goal, 1.2
NUM_NORMAL = 4  # clients
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 16, "ignore_eos": True}
# Pipelined, and in all more than the kernel takes in for a reader.
MANY = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200
UNLIMITED = httpx.Limits(max_connections=None)


async def normal(url: str, seconds: float) -> list[float]:
    """How long requests of clients take that ask one after another."""
    took = []
    end = time.monotonic() + seconds

    async def ask(client: httpx.AsyncClient) -> None:
        while (started := time.monotonic()) < end:
            assert (await client.post("/v1/completions", json=SHORT)).status_code == 200
            took.append(time.monotonic() - started)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(ask(client) for _ in range(NUM_NORMAL)))
    return took


async def drip(client: httpx.AsyncClient) -> float:
    """Seconds until the server gave up on a client that sends its headers byte after byte."""
    started = time.monotonic()
    response = await client.post("/v1/completions", json=SHORT)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def dead_readers(server: ChaosServer, proxy: SlowProxy, count: int) -> AsyncIterator[None]:
    """Each asks for more than it will ever take; begins when the server writes no more to any."""
    connections = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(count)]
    for _, writer in connections:
        writer.write(MANY)

    def is_settled() -> bool:
        before = num_answered(server)
        return before > count and num_answered(server) == before

    await asyncio.to_thread(until, is_settled)
    yield
    for _, writer in connections:
        writer.close()


def num_answered(server: ChaosServer) -> float:
    every = server.metric("mmtad_http_requests_total", status="200")
    return every - server.metric("mmtad_http_requests_total", route="/metrics")


async def test_slow_clients_hold_up_nobody(start_chaos: StartChaos, long: bool, record_property: Any) -> None:
    num_dripping, num_dead, seconds = (200, 50, LIMITS.header_seconds - 3) if long else (40, 0, 4.0)
    num_slow = num_dripping + num_dead
    with start_chaos() as server:
        await normal(server.url, 1)
        alone = quantile(await normal(server.url, seconds), 0.99)
        async with (
            SlowProxy(server.port, drips=True) as dripping,
            SlowProxy(server.port, stalls=True) as stalling,
            httpx.AsyncClient(base_url=dripping.url, timeout=None, limits=UNLIMITED) as dripper,
        ):
            started = time.monotonic()
            async with dead_readers(server, stalling, num_dead):
                slow = [asyncio.ensure_future(drip(dripper)) for _ in range(num_dripping)]
                await asyncio.to_thread(until, lambda: num_connections(server) >= num_slow)
                beside = quantile(await normal(server.url, seconds), 0.99)
                num_held = num_connections(server)
                told = await asyncio.gather(*slow)
                ceiling = CLOSED_CEILING * LIMITS.reader_seconds
                await asyncio.to_thread(until, lambda: num_connections(server) == 0, ceiling)
                dropped = time.monotonic() - started
        record_property("p99 of others in s, alone and beside", (round(alone, 3), round(beside, 3)))
        record_property("ratio", round(beside / alone, 2))
        record_property("dripping closed after s, at most", round(max(told), 1))
        record_property("dead readers closed after s, at most", round(dropped, 1))
        assert num_held >= num_slow, "they were there all the time"
        assert beside <= RATIO_CEILING * alone
        assert max(told) <= CLOSED_CEILING * LIMITS.header_seconds
        assert len(server.logged("reader_too_slow")) == num_dead
        assert server.stop() == 0
