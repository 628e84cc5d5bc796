"""A seed gives one text: alone, in any company, after a neighbour has left, streamed or whole.

The long form compares 20 seeds in five mixes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import RunningServer
from tests.e2e.events import events_of
from tests.e2e.random_requests import METHODS

pytestmark = pytest.mark.slow

NUM_NEIGHBOURS = 6
Neighbours = Callable[[dict[str, Any]], list[dict[str, Any]]]


def request(seed: int, **fields: Any) -> dict[str, Any]:
    method = METHODS[seed % len(METHODS)]
    content = {"model": "tiny", "prompt": f"seed {seed}", "max_tokens": 24, "ignore_eos": True, "seed": seed}
    return content | {"temperature": 0.9, "speculative": {"method": method}} | fields


def same_method(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [body | {"seed": 1000 + number} for number in range(NUM_NEIGHBOURS)]


def other_methods(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [request(body["seed"] + number, prompt="other") for number in range(1, NUM_NEIGHBOURS + 1)]


def long_prompts(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Prefilled in chunks between the steps of the others."""
    return [body | {"prompt": f"{number}" + "x" * 400, "max_tokens": 4} for number in range(NUM_NEIGHBOURS)]


def nobody(body: dict[str, Any]) -> list[dict[str, Any]]:
    return []


MIXES: dict[str, Neighbours] = {
    "alone": nobody,
    "same method": same_method,
    "other methods": other_methods,
    "long prompts": long_prompts,
    "neighbours leave": same_method,
}


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/v1/completions", json=body | {"stream": True})
    return "".join(event["choices"][0]["text"] for event in events_of(response.text))


async def leave(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """After the first text."""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        await anext(response.aiter_lines())


async def in_company(client: httpx.AsyncClient, mix: str, body: dict[str, Any], *, stream: bool) -> str:
    neighbour = leave if mix == "neighbours leave" else whole
    others = [asyncio.ensure_future(neighbour(client, other)) for other in MIXES[mix](body)]
    text = await (streamed if stream else whole)(client, body)
    await asyncio.gather(*others)
    return text


@pytest.fixture
async def client(calm: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=calm.url, timeout=120) as opened:
        yield opened


async def test_a_seed_gives_one_text(client: httpx.AsyncClient, long: bool, record_property: Any) -> None:
    texts, different = 0, []
    for seed in range(20 if long else len(METHODS)):
        body = request(seed)
        expected = await whole(client, body)
        for number, mix in enumerate(MIXES):
            stream = (seed + number) % 2 == 0
            texts += 1
            if await in_company(client, mix, body, stream=stream) != expected:
                different.append((seed, body["speculative"]["method"], mix, stream))
    record_property("equal texts", f"{texts - len(different)} of {texts}")
    assert different == []
