"""Fifty short requests beside a long one: how much longer the short ones take, and how fast the long one is.

Goals: the 95th percentile of the short ones at most twice what it is without the long one, the long one at
half its own speed or more, everybody served. The long form takes the medians of five rounds.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.e2e.conftest import RunningServer, free_port, launch, running_server, serving
from tests.e2e.events import events_of
from tests.e2e.tiny import write_pair

pytestmark = pytest.mark.slow

CONTEXT = 4096
NUM_SHORT = 50
SHORT_TOKENS = 24
LONG_PROMPT = 3600
LONG_TOKENS = 200
SLOWDOWN_GOAL, SPEED_GOAL = 2.0, 0.5
CEILING = 10.0  # how far a single round on a busy machine may be from a goal


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("fairness")
    pair, port, log = write_pair(folder, positions=CONTEXT), free_port(), folder / "log"
    with (
        log.open("wb") as output,
        launch(serving(pair, port), output) as process,
        running_server(RunningServer(process, port, log), wait=True) as running,
    ):
        yield running
        assert running.stop() == 0


class Round:
    """One measurement after another; prompts differ, so that nobody profits from another's."""

    def __init__(self, client: httpx.AsyncClient, number: int) -> None:
        self._client = client
        self._number = number
        self._sent = 0

    async def _ask(self, prompt_tokens: int, max_tokens: int) -> float:
        """Seconds from the request to the end of its stream."""
        self._sent += 1
        prompt = [1 + self._number, 1 + self._sent, *([7] * (prompt_tokens - 2))]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        started = time.monotonic()
        answer = await self._client.post("/v1/completions", json=body | {"stream": True, "temperature": 0})
        assert answer.status_code == 200, answer.text
        assert events_of(answer.text)[-1]["choices"][0]["finish_reason"] == "length"
        return time.monotonic() - started

    async def short_ones(self) -> float:
        """The 95th percentile of their seconds, all sent at once."""
        seconds = await asyncio.gather(*(self._ask(20, SHORT_TOKENS) for _ in range(NUM_SHORT)))
        return statistics.quantiles(seconds, n=20)[-1]

    async def long_one(self) -> float:
        return await self._ask(LONG_PROMPT, LONG_TOKENS)

    async def slowdown_and_speed(self) -> tuple[float, float]:
        """The slowdown of the short ones beside the long one, and what is left of the speed of that."""
        short_alone, long_alone = await self.short_ones(), await self.long_one()
        long_beside = asyncio.ensure_future(self.long_one())
        await asyncio.sleep(0)
        short_beside = await self.short_ones()
        return short_beside / short_alone, long_alone / await long_beside


async def test_short_and_long_requests_share(
    server: RunningServer, long: bool, record_property: Callable[[str, object], None]
) -> None:
    num_rounds = 5 if long else 1
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        await Round(client, 0).short_ones()  # the first passes of a process take longer
        rounds = [Round(client, 1 + number) for number in range(num_rounds)]
        figures = [await each.slowdown_and_speed() for each in rounds]
    slowdown, speed = (statistics.median(values) for values in zip(*figures, strict=True))
    record_property("slowdown of short requests", round(slowdown, 2))
    record_property("speed of the long one", round(speed, 2))
    ceiling = 1.0 if long else CEILING
    assert slowdown <= SLOWDOWN_GOAL * ceiling
    assert speed >= SPEED_GOAL / ceiling
