"""When requests are sent: by clients that wait for their answers, or at random whatever happens."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from benchmarks.load.client import Outcome

Ask = Callable[[str, float], Awaitable[Outcome]]


async def closed_loop(ask: Ask, prompts: Iterable[str], concurrency: int) -> list[Outcome]:
    """`concurrency` clients, each with one request at a time, until the prompts are used up."""
    left = iter(prompts)

    async def client() -> list[Outcome]:
        return [await ask(prompt, time.monotonic()) for prompt in left]

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client()) for _ in range(concurrency)]
    return [outcome for each in clients for outcome in each.result()]


async def open_loop(ask: Ask, prompts: Sequence[str], rate: float, seed: int) -> list[Outcome]:
    """A Poisson process of `rate` requests per second; nobody waits for an answer before the next one."""
    random_gaps = random.Random(seed)
    due = time.monotonic()
    tasks: list[asyncio.Task[Outcome]] = []

    async def one(prompt: str, due: float) -> Outcome:
        await asyncio.sleep(due - time.monotonic())
        return await ask(prompt, due)

    async with asyncio.TaskGroup() as requests:
        for prompt in prompts:
            tasks.append(requests.create_task(one(prompt, due)))
            due += random_gaps.expovariate(rate)
    return [task.result() for task in tasks]
