"""Workers are killed again and again under load: nobody hangs, victims are told, others are served.

The long form kills one every 20 s for 10 minutes under 32 clients; the short form kills one.
"""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.chaos.conftest import ChaosServer, StartChaos
from tests.e2e.conftest import until
from tests.e2e.events import end_of_stream

pytestmark = pytest.mark.slow

TOLD_SECONDS = 10.0  # ten times the goal
READY_SECONDS = 100.0  # ten times the goal
PAUSE_SECONDS = 20.0


@dataclass
class Figures:
    """What the clients saw; seconds from a kill until its last victim was told, and until all are ready."""

    answers: dict[str, int] = field(default_factory=dict)
    told_seconds: list[float] = field(default_factory=list)
    ready_seconds: list[float] = field(default_factory=list)

    def count(self, answer: str) -> None:
        self.answers[answer] = self.answers.get(answer, 0) + 1


class Clients:
    """Each streams one request after another until told to stop."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.figures = Figures()
        self.stopping = False
        self.last_victim = 0.0
        self._client = client

    async def run(self, number: int) -> None:
        rng = random.Random(number)
        while not self.stopping:
            body = {"model": "tiny", "prompt": "x", "max_tokens": rng.randrange(1, 200), "stream": True}
            answer = await self._ask(body | {"ignore_eos": True, "seed": number})
            self.figures.count(answer)
            if answer == "worker_failed":
                self.last_victim = time.monotonic()
            elif answer == "no_worker":
                await asyncio.sleep(0.1)

    def wait_for_answers(self, count: int) -> None:
        """So that streams are in the middle when something happens to them."""
        until(lambda: sum(self.figures.answers.values()) >= count, 60)

    async def _ask(self, body: dict[str, Any]) -> str:
        """How it ended: "length", or the code of an error. A stream must say so before it ends."""
        return end_of_stream(await self._client.post("/v1/completions", json=body))


async def kill_one(server: ChaosServer, clients: Clients, rng: random.Random) -> None:
    """Kill one of two workers and wait until both are ready again."""
    killed = time.monotonic()
    clients.last_victim = killed
    os.kill(rng.choice(server.workers()), signal.SIGKILL)
    up = 0.0
    while up < 2 or time.monotonic() - killed < 1:
        await asyncio.sleep(0.2)
        up = await asyncio.to_thread(server.metric, "mmtad_worker_up")
        assert time.monotonic() - killed < READY_SECONDS
    clients.figures.ready_seconds.append(time.monotonic() - killed)
    clients.figures.told_seconds.append(clients.last_victim - killed)


async def test_nobody_hangs_while_workers_are_killed(
    start_chaos: StartChaos, long: bool, record_property: Any
) -> None:
    num_clients, num_kills = (32, 30) if long else (8, 1)
    rng = random.Random(1)
    with start_chaos("--num-workers", "2", "--max-num-seqs", "8") as server:
        until(lambda: server.metric("mmtad_worker_up") == 2, READY_SECONDS)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            clients = Clients(client)
            running = [asyncio.ensure_future(clients.run(number)) for number in range(num_clients)]
            for _ in range(num_kills):
                enough = sum(clients.figures.answers.values()) + num_clients
                await asyncio.to_thread(clients.wait_for_answers, enough)
                started = time.monotonic()
                await kill_one(server, clients, rng)
                if long:
                    await asyncio.sleep(max(0.0, PAUSE_SECONDS - (time.monotonic() - started)))
            clients.stopping = True
            await asyncio.gather(*running)  # each ends, and none in another way than these
        figures = clients.figures
        record_property("answers", figures.answers)
        record_property("last victim told after s, at most", round(max(figures.told_seconds), 3))
        record_property("ready again after s, at most", round(max(figures.ready_seconds), 1))
        assert figures.answers.keys() <= {"length", "worker_failed", "no_worker"}, figures
        assert figures.answers["length"] > figures.answers.get("worker_failed", 0), figures
        assert max(figures.told_seconds) < TOLD_SECONDS, figures
        assert server.metric("mmtad_requests_running") == 0
        assert server.metric("mmtad_worker_restarts_total") == num_kills
        assert server.stop() == 0
