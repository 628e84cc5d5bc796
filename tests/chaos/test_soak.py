"""Many requests of every kind, a fifth of them given up: none is lost, none ends twice, nothing leaks."""

import asyncio
import collections
import random
from typing import Any

import httpx
import pytest

from benchmarks.loop_lag import Buckets, buckets_between, lag_buckets, percentile
from tests.chaos.conftest import ChaosServer, StartChaos
from tests.chaos.footprint import Footprints, footprints, growth_mib, leaks, num_connections
from tests.e2e.conftest import until
from tests.e2e.events import events_of
from tests.e2e.random_requests import draw

pytestmark = pytest.mark.slow

AT_ONCE = 32
SHARE_ABORTED = 0.2
LAG_CEILING_SECONDS = 0.25  # of the bucket that holds ten times the goal
NUM_PARTS = 5  # looks at the processes at rest: after the first fifth they are warm


def client_of(server: ChaosServer) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


class Soak:
    """Sends numbered requests and checks the end of each."""

    def __init__(self, server: ChaosServer) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self.num_sent = 0
        self._server = server
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def send(self, count: int) -> Footprints:
        """The next `count` requests, then what the processes hold when all have ended and left."""
        first, self.num_sent = self.num_sent, self.num_sent + count
        async with client_of(self._server) as client:
            await asyncio.gather(*(self._request(client, number) for number in range(first, self.num_sent)))
        await asyncio.to_thread(until, lambda: self._server.metric("mmtad_requests_running") == 0)
        await asyncio.to_thread(until, lambda: num_connections(self._server) == 0)
        assert self._server.metric("mmtad_requests_waiting") == 0
        return footprints(self._server)

    async def _request(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        body = draw(rng, number) | {"stream": rng.random() < 0.5}
        work = self._stream(client, body) if body["stream"] else self._whole(client, body)
        async with self._gate:
            if rng.random() >= SHARE_ABORTED:
                await work
                self.ends["completed"] += 1
                return
            try:
                await asyncio.wait_for(work, rng.expovariate(10))
            except TimeoutError:  # cancelled, and with it the connection closed
                self.ends["aborted"] += 1
            else:
                self.ends["completed before it was given up"] += 1

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, (body, response.text)
        ends = [choice["finish_reason"] for choice in response.json()["choices"]]
        assert set(ends) <= {"stop", "length"}, (body, ends)

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        ends: dict[int, str] = {}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, body
            events = events_of((await response.aread()).decode())
        seen = set()
        for event in events:
            for choice in event["choices"]:
                assert choice["index"] not in ends, (body, "something came behind an end")
                seen.add(choice["index"])
                if choice["finish_reason"] is not None:
                    ends[choice["index"]] = choice["finish_reason"]
        assert ends.keys() == seen, (body, ends)
        assert set(ends.values()) <= {"stop", "length"}, (body, ends)


def check_log(server: ChaosServer, num_sent: int) -> None:
    """Every request has its one line, and no command failed."""
    lines = [line for line in server.logged("request") if line["route"] == "/v1/completions"]
    assert len({line["request_id"] for line in lines}) == len(lines)
    assert len(lines) <= num_sent  # who left while connecting was not seen
    assert server.metric("mmtad_requests_total", finish_reason="error") == 0
    assert server.logged("step_failed") == []


async def soak(server: ChaosServer, num_requests: int) -> tuple[list[Footprints], Soak, Buckets]:
    run = Soak(server)
    async with client_of(server) as client:
        before = await lag_buckets(client)
    at_rest = [await run.send(num_requests // NUM_PARTS) for _ in range(NUM_PARTS)]
    async with client_of(server) as client:
        return at_rest, run, buckets_between(before, await lag_buckets(client))


@pytest.fixture(scope="module")
def num_requests(long: bool) -> int:
    return 10_000 if long else 300


async def test_nothing_is_lost_and_nothing_leaks(
    start_chaos: StartChaos, num_requests: int, record_property: Any
) -> None:
    with start_chaos() as server:
        at_rest, run, lag = await soak(server, num_requests)
        record_property("ends", dict(run.ends))
        for name in ("api", "worker"):
            record_property(f"growth of the {name} in MiB", round(growth_mib(at_rest, name), 1))
        record_property("event loop lag p99, max", (percentile(lag, 0.99), percentile(lag, 1.0)))
        assert run.ends.total() == num_requests
        assert run.ends["aborted"] >= num_requests * SHARE_ABORTED / 4
        assert leaks(at_rest) == [], at_rest
        assert percentile(lag, 0.99) <= LAG_CEILING_SECONDS
        check_log(server, num_requests)
        # The detector finds what leaks: here the worker, a MiB in each step.
        server.order(leak=True)
        at_rest, run, _ = await soak(server, 50)
        server.order()
        record_property("growth of a worker that leaks in MiB", round(growth_mib(at_rest, "worker"), 1))
        assert leaks(at_rest) == ["worker: memory"], at_rest
        assert server.stop() == 0
