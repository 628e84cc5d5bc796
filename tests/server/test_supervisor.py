"""Real child processes: started over a socketpair, watched, replaced, stopped, never left behind."""

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from decoding import DecodingConfig, SamplingParams
from server import supervisor, transport
from server.messages import (
    Event,
    FatalEvent,
    FinishedEvent,
    GenerateCommand,
    LoadCommand,
    LoadingEvent,
    ReadyEvent,
    StepEvent,
)
from server.supervisor import WorkerProcess
from tests.server.fakes import until

SCRIPTED = (sys.executable, "-m", "tests.server.scripted_worker")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Watched:
    """A worker process with what it told."""

    def __init__(self, target: str) -> None:
        self.events: list[Event] = []
        self.num_lost = 0
        load = LoadCommand(
            target=target, draft=None, device="cpu", dtype="auto", max_model_len=None, max_num_seqs=2
        )
        self.process = WorkerProcess(load, self.events.append, self._lost, SCRIPTED)

    def _lost(self) -> None:
        self.num_lost += 1

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    async def generate(self) -> None:
        command = GenerateCommand(
            id="a", prompt_ids=[1], params=SamplingParams(max_tokens=4), config=DecodingConfig()
        )
        before = self.count(FinishedEvent)
        self.process.send(command)
        await until(lambda: self.count(FinishedEvent) > before)


Watch = Callable[[str], AbstractAsyncContextManager[Watched]]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(transport, "FIRST_BACKOFF_SECONDS", 0.01)

    @asynccontextmanager
    async def start(target: str) -> AsyncIterator[Watched]:
        watched = Watched(target)
        watched.process.start()
        yield watched
        pid = watched.process.pid
        await watched.process.stop()
        assert pid is None or not is_alive(pid)

    return start


async def test_a_worker_serves_and_stops(watch: Watch) -> None:
    async with watch("ok") as watched:
        await until(lambda: watched.count(ReadyEvent) == 1)
        await watched.generate()
        assert watched.count(LoadingEvent) == 1
        assert watched.count(StepEvent) == 2
    assert watched.num_lost == 0


async def test_a_killed_worker_is_told_and_replaced(watch: Watch) -> None:
    async with watch("ok") as watched:
        for number in range(1, 3):
            await until(lambda number=number: watched.count(ReadyEvent) == number)
            pid = watched.process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda number=number: watched.num_lost == number, seconds=1)
        await until(lambda: watched.count(ReadyEvent) == 3)
        await watched.generate()


async def test_a_worker_ignores_the_signals_of_the_terminal(watch: Watch) -> None:
    async with watch("ok") as watched:
        await until(lambda: watched.count(ReadyEvent) == 1)
        pid = watched.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        await watched.generate()
        assert os.getpgid(pid) == pid


@pytest.mark.parametrize("failing", ["socketpair", "spawn_worker", "open_connection"])
async def test_a_worker_that_cannot_be_started_is_told_and_tried_again(
    failing: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that ran out of descriptors or processes for a while; nothing of it stays open."""
    owner = {"socketpair": socket, "spawn_worker": supervisor, "open_connection": asyncio}[failing]
    start, attempts = getattr(owner, failing), []

    def scarce(*args: Any, **kwargs: Any) -> Any:
        attempts.append(len(os.listdir("/proc/self/fd")))
        if len(attempts) <= 3:
            raise OSError(errno.EMFILE, "too many open files")
        return start(*args, **kwargs)

    monkeypatch.setattr(owner, failing, scarce)
    with capture_logs() as logged:
        async with watch("ok") as watched:
            await until(lambda: watched.count(ReadyEvent) == 1)
            assert watched.num_lost == 3
            await watched.generate()
    failures = [entry for entry in logged if entry["event"] == "transport_failed"]
    assert [(entry["exc_info"], entry["worker"]) for entry in failures] == [(True, 0)] * 3
    assert len(set(attempts)) == 1


async def test_a_bad_frame_ends_its_link_and_no_more(watch: Watch) -> None:
    async with watch("bad-frame") as watched:
        await until(lambda: watched.num_lost >= 2)
        assert watched.count(ReadyEvent) >= 2


async def test_a_fatal_load_is_told_once_and_not_repeated(watch: Watch) -> None:
    async with watch("fatal") as watched:
        await until(lambda: watched.count(FatalEvent) == 1)
        assert watched.events[-1] == FatalEvent(message="no such model at all", exit_code=2)
        process = watched.process
        await until(lambda: process._task is not None and process._task.done())
        assert watched.num_lost == 0


async def test_an_unforeseen_failure_of_loading_is_fatal_without_details(watch: Watch) -> None:
    async with watch("crash") as watched:
        await until(lambda: watched.count(FatalEvent) == 1)
        event = watched.events[-1]
        assert isinstance(event, FatalEvent)
        assert event.exit_code == 1
        assert "secret" not in event.message


async def test_a_loading_worker_is_stopped_at_once(watch: Watch) -> None:
    async with watch("silent") as watched:
        await until(lambda: watched.count(LoadingEvent) == 1)
        started = asyncio.get_running_loop().time()
        await watched.process.stop()
        assert asyncio.get_running_loop().time() - started < 1


async def test_a_worker_has_the_time_to_unload(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its link is closed long before its process ends, which is no reason to kill it."""
    monkeypatch.setattr(supervisor, "EXIT_GRACE_SECONDS", 0.01)
    with capture_logs() as logged:
        async with watch("unloads") as watched:
            await until(lambda: watched.count(ReadyEvent) == 1)
    assert [entry["status"] for entry in logged if entry["event"] == "worker_ended"] == [0]


async def test_a_worker_ends_with_its_parent(watch: Watch) -> None:
    """Closing our end is what the kernel does for a parent that was killed."""
    async with watch("silent") as watched:
        await until(lambda: watched.count(LoadingEvent) == 1)
        pid = watched.process.pid
        assert pid is not None
        assert watched.process._writer is not None
        watched.process._writer.close()
        await until(lambda: not is_alive(pid))
