"""Closed and open loop: how many at once, and when."""

import asyncio
import itertools
import random
import time

import pytest

from benchmarks.load.arrivals import closed_loop, open_loop
from benchmarks.load.client import Outcome


async def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    running: set[str] = set()
    peaks: list[int] = []

    async def ask(prompt: str, due: float) -> Outcome:
        running.add(prompt)
        peaks.append(len(running))
        await asyncio.sleep(0)
        running.remove(prompt)
        return Outcome(due=due, ended=time.monotonic(), tokens=int(prompt))

    outcomes = await closed_loop(ask, map(str, range(20)), 4)
    assert sorted(outcome.tokens for outcome in outcomes) == list(range(20))
    assert max(peaks) == 4


async def test_an_open_loop_sends_at_random_and_waits_for_nobody() -> None:
    sent: list[float] = []
    all_sent = asyncio.Event()

    async def ask(prompt: str, due: float) -> Outcome:
        assert time.monotonic() >= due
        sent.append(due)
        if len(sent) == 50:
            all_sent.set()
        await all_sent.wait()  # the first answer comes after the last request
        return Outcome(due=due, ended=time.monotonic())

    async with asyncio.timeout(30):
        outcomes = await open_loop(ask, ["p"] * 50, rate=500.0, seed=7)
    expected = random.Random(7)
    gaps = [after - before for before, after in itertools.pairwise(each.due for each in outcomes)]
    assert gaps == pytest.approx([expected.expovariate(500.0) for _ in gaps], abs=1e-6)
