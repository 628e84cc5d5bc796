"""Ten times as many requests as can be served: the rest is told at once, who is taken is served in time."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from benchmarks.loop_lag import buckets_between, lag_buckets, percentile, quantile
from tests.chaos.conftest import StartChaos
from tests.chaos.footprint import LIMIT_MIB, footprints, growth_mib

pytestmark = pytest.mark.slow

ROWS, QUEUE = 4, 8
TIMES = 10  # the capacity
CEILING = 10.0  # times the goal
REJECT_SECONDS = 0.05
LAG_CEILING_SECONDS = 0.25  # of the bucket that holds ten times the goal
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 64, "ignore_eos": True, "stream": True}


@dataclass
class Flood:
    """What became of the requests, in seconds after each was sent."""

    client: httpx.AsyncClient
    rejected: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    async def ask(self) -> None:
        started = time.monotonic()
        first = None
        async with self.client.stream("POST", "/v1/completions", json=BODY) as response:
            if response.status_code != httpx.codes.OK:
                error = json.loads(await response.aread())["error"]
                self.rejected.append(time.monotonic() - started)
                assert (response.status_code, error["code"]) == (503, "queue_full")
                assert int(response.headers["retry-after"]) >= 1
                return
            async for line in response.aiter_lines():
                if first is None and line.startswith("data: "):
                    first = time.monotonic() - started
        assert first is not None
        self.first.append(first)
        self.ended.append(time.monotonic() - started)

    async def closed(self, seconds: float) -> float:
        """Requests per second that as many clients are served as there are rows."""
        end = time.monotonic() + seconds

        async def ask_on() -> None:
            while time.monotonic() < end:
                await self.ask()

        started = time.monotonic()
        await asyncio.gather(*(ask_on() for _ in range(ROWS)))
        return len(self.ended) / (time.monotonic() - started)

    async def open(self, rate: float, seconds: float) -> None:
        """As many requests per second, whether they are answered or not."""
        started = time.monotonic()
        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(started + number / rate - time.monotonic())
            tasks.append(asyncio.ensure_future(self.ask()))
        await asyncio.gather(*tasks)


def longest_wait(run: Flood) -> float:
    """Until all that may stand before a request have been served, as fast as these were."""
    served = [ended - first for first, ended in zip(run.first, run.ended, strict=True)]
    return (ROWS + QUEUE) / ROWS * quantile(served, 0.99)


async def flood(client: httpx.AsyncClient, seconds: float) -> tuple[Flood, Flood]:
    """What became of the requests of a server that is just busy, and of ten times as many."""
    calm = Flood(client)
    rate = await calm.closed(seconds / 4)
    run = Flood(client)
    await run.open(TIMES * rate, seconds)
    return calm, run


async def test_who_is_not_taken_is_told_at_once(
    start_chaos: StartChaos, long: bool, record_property: Any
) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    flags = ("--max-num-seqs", str(ROWS), "--max-num-queued-reqs", str(QUEUE))
    with start_chaos(*flags) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            await Flood(client).closed(1)  # warms it up
            at_rest, before = [footprints(server)], await lag_buckets(client)
            calm, run = await flood(client, 60 if long else 4)
            at_rest.append(footprints(server))
            lag = buckets_between(before, await lag_buckets(client))
        rejected, first = quantile(run.rejected, 0.99), quantile(run.first, 0.99)
        bound = longest_wait(run)
        record_property("rejected, accepted", (len(run.rejected), len(run.first)))
        record_property("rejects p99 in s", round(rejected, 4))
        record_property("first token of accepted p99 in s", round(first, 2))
        record_property("its bound in s, when just busy", (round(bound, 2), round(longest_wait(calm), 2)))
        record_property("growth of the API in MiB", round(growth_mib(at_rest, "api"), 1))
        record_property("event loop lag p99, max", (percentile(lag, 0.99), percentile(lag, 1.0)))
        assert len(run.rejected) > len(run.first) > 0
        assert rejected <= CEILING * REJECT_SECONDS
        assert first <= CEILING * bound
        assert growth_mib(at_rest, "api") < LIMIT_MIB["api"]
        assert percentile(lag, 0.99) <= LAG_CEILING_SECONDS
        assert server.stop() == 0
