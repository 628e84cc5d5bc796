"""Random paths and random models: not one more series of metrics."""

import asyncio
import random
import string
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import RunningServer
from tests.e2e.random_requests import METHODS

pytestmark = pytest.mark.slow

MAX_SERIES = 2000
AT_ONCE = 16
CHARACTERS = string.ascii_letters + string.digits + "-._~%/:@"
HTTP_METHODS = ("GET", "POST", "PUT", "DELETE")


async def series(client: httpx.AsyncClient) -> set[str]:
    lines = (await client.get("/metrics")).text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def name(rng: random.Random) -> str:
    return "".join(rng.choices(CHARACTERS, k=rng.randrange(1, 100)))


async def send(client: httpx.AsyncClient, rng: random.Random, number: int) -> None:
    """A path that does not exist, or a model."""
    if number % 2:
        response = await client.request(HTTP_METHODS[number // 2 % 4], f"/x{name(rng)}")
    else:
        response = await client.post("/v1/completions", json={"model": name(rng), "prompt": "x"})
    assert response.status_code == 404, response.text


async def test_series_are_bounded(calm: RunningServer, long: bool, record_property: Any) -> None:
    num_requests = 20_000 if long else 600
    rng = random.Random(20)
    gate = asyncio.Semaphore(AT_ONCE)

    async with httpx.AsyncClient(base_url=calm.url, timeout=120) as client:

        async def guarded(number: int) -> None:
            async with gate:
                await send(client, rng, number)

        for method in METHODS:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 8, "speculative": {"method": method}}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        await asyncio.gather(*(guarded(number) for number in range(8)))
        await series(client)  # a scrape counts itself
        before = await series(client)
        await asyncio.gather(*(guarded(number) for number in range(num_requests)))
        after = await series(client)
    record_property("series before, after", (len(before), len(after)))
    assert after == before
    assert len(after) <= MAX_SERIES
