"""Servers take turns over the same requests; whoever's turn it is not is suspended."""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.load.arrivals import closed_loop
from benchmarks.load.client import Outcome
from benchmarks.load.processes import CpuClock, started
from benchmarks.load.summary import Run
from benchmarks.peer.servers import PEERS, Server, Weights, mmtad
from benchmarks.speed import spread

TIMEOUT_SECONDS = 120.0


@dataclass(slots=True)
class Entry:
    """One row in the making: a server that runs, the fields of its requests, its runs per concurrency."""

    name: str
    server: Server
    process: psutil.Process
    fields: dict[str, Any]
    runs: dict[int, list[Run]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def turn(self, prompts: list[str], concurrency: int) -> Run:
        """All prompts, by so many clients; raises ValueError when one is refused."""
        clock = CpuClock(self.process)
        with awake(self.process):
            before = clock.seconds()
            outcomes = asyncio.run(self._all(prompts, concurrency))
            after = clock.seconds()
        failed = [each.error for each in outcomes if each.error]
        if failed:
            raise ValueError(f"{len(failed)} of {len(outcomes)} requests failed, one with: {failed[0]}")
        return Run(outcomes, None if before is None or after is None else after - before)

    async def _all(self, prompts: list[str], concurrency: int) -> list[Outcome]:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=TIMEOUT_SECONDS) as http:

            async def ask(prompt: str, due: float) -> Outcome:
                body = {"model": self.server.model, "prompt": prompt, **self.fields}
                try:
                    answer = await http.post("/v1/completions", json=body)
                    answer.raise_for_status()
                    content = answer.json()
                    self.texts[prompt] = content["choices"][0]["text"]
                    tokens = content["usage"]["completion_tokens"]
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    return Outcome(due, time.monotonic(), error=f"{type(error).__name__}: {error}")
                return Outcome(due, time.monotonic(), tokens=tokens)

            return await closed_loop(ask, prompts, concurrency)


@contextlib.contextmanager
def awake(process: psutil.Process) -> Iterator[None]:
    """Lets a suspended process and its children run for as long as the context lasts."""
    for each in _tree(process):
        each.resume()
    try:
        yield
    finally:
        suspend(process)


def suspend(process: psutil.Process) -> None:
    for each in _tree(process):
        each.suspend()


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


@contextlib.contextmanager
def running(
    names: list[str], weights: Weights, shared: dict[str, Any], progress: Callable[[str], None]
) -> Iterator[tuple[list[Entry], list[dict[str, Any]]]]:
    """Entries of this server and of the peers that came up, all suspended; rows of those that did not."""
    entries: list[Entry] = []
    missing: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for name, make in {"mmtad-server": mmtad, **{name: PEERS[name] for name in names}}.items():
            try:
                server = make(weights)
                process = stack.enter_context(_started(server))
            except (ValueError, OSError) as error:
                missing.append({"name": name, "reason": str(error)})
                progress(f"{name} cannot run: {error}")
                continue
            progress(f"{name} is ready")
            entries += [
                Entry(row, server, process, {**shared, **fields}) for row, fields in server.rows.items()
            ]
        yield entries, missing


@contextlib.contextmanager
def _started(server: Server) -> Iterator[psutil.Process]:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **server.variables}
    if not server.ours:
        variables.pop("PYTHONPATH", None)
    with started(server.command, server.url, ready=server.ready, environment=variables) as process:
        suspend(process)
        try:
            yield process
        finally:
            for each in _tree(process):
                each.resume()


def take_turns(
    entries: list[Entry],
    prompts: list[str],
    concurrencies: list[int],
    repeats: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every entry once per repeat and concurrency, after a round to warm up; rows of those that failed.

    No round begins after `seconds`, but one is always measured.
    """
    deadline = time.monotonic() + seconds
    failed: list[dict[str, Any]] = []
    for repeat in range(repeats + 1):
        for concurrency in concurrencies:
            for entry in list(entries):
                try:
                    run = entry.turn(prompts, concurrency)
                except ValueError as error:
                    failed.append({"name": entry.name, "dtype": entry.server.dtype, "reason": str(error)})
                    entries.remove(entry)
                    continue
                if repeat > 0:
                    entry.runs.setdefault(concurrency, []).append(run)
        progress(f"servers: round {repeat}/{repeats}")
        if repeat > 0 and time.monotonic() > deadline:
            break
    return failed


def rows(entries: list[Entry]) -> list[dict[str, Any]]:
    """One row per entry and concurrency; `same_texts` is the share of answers that the first entry gave."""
    found = []
    for entry in entries:
        same = [text == entries[0].texts.get(prompt) for prompt, text in entry.texts.items()]
        for concurrency, runs in entry.runs.items():
            rates = [run.tokens / run.seconds for run in runs]
            cpu = [run.cpu_seconds / run.tokens for run in runs if run.cpu_seconds is not None]
            found.append(
                {
                    "name": entry.name,
                    "group": f"concurrency {concurrency}",
                    "ours": entry.server.ours,
                    "version": entry.server.version,
                    "dtype": entry.server.dtype,
                    "tokens_per_s": statistics.median(rates),
                    "spread": spread(rates),
                    "cpu_ms_per_token": 1e3 * statistics.median(cpu) if cpu else None,
                    "tokens": runs[-1].tokens,
                    "same_texts": sum(same) / len(same),
                    "repeats": len(runs),
                    "bytes_per_step": entry.server.step_bytes,
                    "batch": concurrency,
                }
            )
    return found
