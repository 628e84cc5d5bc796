"""Which method runs at which load, in which order, and what every run gave."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress, TaskID

from benchmarks.load.arrivals import closed_loop, open_loop
from benchmarks.load.client import Endpoint, Outcome
from benchmarks.load.processes import CpuClock
from benchmarks.load.summary import Objective, Run, summarise

DISCARDED = 3
SERVER = "server"  # stands for the method where the server has only one


@dataclass
class LoadTest:
    """One test on its way: the server, the prompts, and the runs of every point so far."""

    endpoint: Endpoint
    methods: list[str]
    prompts: list[str]
    arguments: argparse.Namespace
    clock: CpuClock | None
    progress: Progress
    bar: TaskID
    runs: dict[tuple[str, str, float], list[Run]] = field(default_factory=dict)
    tokens: int = 0

    async def ask(self, prompt: str, method: str, due: float) -> Outcome:
        outcome = await self.endpoint.ask(prompt, None if method == SERVER else method, due)
        self.tokens += outcome.tokens
        self.progress.update(self.bar, advance=1, tokens=self.tokens)
        return outcome

    async def warm_up(self) -> None:
        """Raises ValueError when a method cannot be asked at all."""
        for method, prompt in itertools.product(self.methods, self._some_prompts(DISCARDED)):
            outcome = await self.ask(prompt, method, 0.0)
            if outcome.error is not None:
                raise ValueError(f"a first request with method {method} failed: {outcome.error}")

    async def run(self) -> None:
        arguments = self.arguments
        for _, level, method in itertools.product(
            range(arguments.repeats), arguments.concurrency, self.methods
        ):
            await self._measure(method, "closed", level)
        for seed, share, method in itertools.product(range(arguments.repeats), arguments.rates, self.methods):
            await self._measure(method, "open", share, seed)

    async def _measure(self, method: str, mode: str, level: float, seed: int = 0) -> None:
        self.progress.update(self.bar, description=f"{method}, {mode} {level:g}")
        prompts = self._some_prompts(requests_of(self.arguments, mode, level))

        async def ask(prompt: str, due: float) -> Outcome:
            return await self.ask(prompt, method, due)

        before = self.clock.seconds() if self.clock else None
        if mode == "closed":
            outcomes = await closed_loop(ask, prompts, int(level))
        else:
            outcomes = await open_loop(ask, prompts, level * self._capacity(method), seed)
        after = self.clock.seconds() if self.clock else None
        spent = None if before is None or after is None else after - before
        self.runs.setdefault((method, mode, level), []).append(Run(outcomes, spent))

    def _some_prompts(self, count: int) -> list[str]:
        return list(itertools.islice(itertools.cycle(self.prompts), count))

    def _capacity(self, method: str) -> float:
        """Requests per second; raises ValueError when the closed loop served none."""
        rates = [
            len(run.served) / run.seconds
            for (name, mode, _), runs in self.runs.items()
            for run in runs
            if (name, mode) == (method, "closed")
        ]
        if not any(rates):
            raise ValueError(f"no request with method {method} was served, so there is no capacity to share")
        return max(rates)

    def points(self, objective: Objective) -> Iterator[dict[str, Any]]:
        for (method, mode, level), runs in self.runs.items():
            load: dict[str, Any] = {"concurrency": int(level)}
            if mode == "open":
                load = {"share_of_capacity": level, "rate": level * self._capacity(method)}
            yield {"method": method, "mode": mode, **load, **summarise(runs, objective)}


def requests_of(arguments: argparse.Namespace, mode: str, level: float) -> int:
    """At least four per client, so that most of a closed run has all clients at work."""
    least: int = arguments.requests
    return max(least, 4 * int(level)) if mode == "closed" else least


def total_requests(arguments: argparse.Namespace, num_methods: int) -> int:
    loads = [("closed", level) for level in arguments.concurrency] + [
        ("open", rate) for rate in arguments.rates
    ]
    each = sum(requests_of(arguments, mode, level) for mode, level in loads)
    repeats: int = arguments.repeats
    return num_methods * (DISCARDED + repeats * each)
