"""The pool: where requests wait, are placed on workers, watched, counted and given up.

`WorkerPool.generate` is the only way to tokens; `server.open_commands` records what they cost.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import Any

import structlog

from decoding import FinishReason
from server.chat import ChatTemplate, compile_template
from server.config import ServerConfig
from server.errors import OverloadedError
from server.messages import (
    CancelCommand,
    EnergyEvent,
    Event,
    FailedEvent,
    FatalEvent,
    FinishCommand,
    FinishedEvent,
    GenerateCommand,
    LoadCommand,
    LoadingEvent,
    ReadyEvent,
    StepEvent,
    StepStatsEvent,
)
from server.metrics import Metrics
from server.open_commands import OpenCommands
from server.pending import GenerationEvent, Pending, Stream, Worker
from server.placement import Placement, WorkerState
from server.reservations import Reservation, Reservations
from server.supervisor import WorkerProcess, launch_of, load_command
from server.text import TextCodec
from server.turns import Turn

log = structlog.get_logger("server.pool")


Launch = Callable[[LoadCommand, Callable[[Event], None], Callable[[], None]], Worker]


WATCH_SECONDS = 1.0


class WorkerPool:
    """Workers, their requests, and the bounds on both.

    `launch` starts a worker on this machine (tests give a scripted one). The pool is used from one event
    loop.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics, launch: Launch = WorkerProcess) -> None:
        self.metrics = metrics
        self.codec: TextCodec | None = None
        self.model: ReadyEvent | None = None
        self.template: ChatTemplate | None = None
        self.draining = False
        self.created = int(time.time())
        self._fatal: FatalEvent | None = None
        self._failed = asyncio.Event()
        self._config = config
        self._launch: Launch = launch_of(config, launch)
        self._placement = Placement()
        self._open_commands = OpenCommands(metrics, self._placement)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reserved = Reservations(config)
        self._ready = asyncio.Event()

    # Life

    def start(self) -> None:
        """Start the workers; returns at once, `refusal` says how far they are."""
        for index in range(self._config.num_workers):
            self._start_worker(index)
        self._spawn(self._watch_steps())

    def _start_worker(self, index: int) -> None:
        load = load_command(self._config, index)
        worker = WorkerState(
            str(index),
            self._launch(load, lambda event: self._on_event(worker, event), lambda: self._on_lost(worker)),
            moved=time.monotonic(),
        )
        self._placement.workers.append(worker)
        self.metrics.worker_up.labels(worker.name).set(0)
        self.metrics.worker_restarts.labels(worker.name)  # from zero on, or the first death is no increase
        worker.transport.start()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_steps(self) -> None:
        """A worker with work that makes no step is as good as dead, and so is one that loads for ever."""
        bounds = self._config.worker_timeout, self._config.worker_load_timeout
        while True:
            await asyncio.sleep(min(WATCH_SECONDS, min(bounds) / 4))
            for worker in self._placement.stuck(time.monotonic(), *bounds):
                seconds = bounds[worker.ready is None]
                log.error(
                    "worker_stuck",
                    worker=worker.name,
                    loading=worker.ready is None,
                    timeout_seconds=seconds,
                )
                worker.note_loading(time.monotonic())
                worker.transport.replace()

    async def wait_ready(self) -> ReadyEvent:
        await self._ready.wait()
        assert self.model is not None
        return self.model

    async def wait_fatal(self) -> FatalEvent:
        """Returns when a worker says that the pair cannot be served."""
        await self._failed.wait()
        assert self._fatal is not None
        return self._fatal

    @property
    def refusal(self) -> str | None:
        """The error code of why no request can be taken now, None when one can."""
        if self.draining:
            return "draining"
        if self.model is None or self.codec is None:
            return "model_loading"
        return None if self._placement.any_ready and self._fatal is None else "no_worker"

    @property
    def draft_enabled(self) -> bool:
        """False while a worker decodes with its target alone because its draft failed."""
        return all(worker.draft_enabled for worker in self._placement.workers)

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - the rest is told, not cancelled
        """Take nothing new, let what runs finish within `timeout` seconds, then tell the rest."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reserved.idle.wait(), timeout)
        for pending in self._open_commands:
            pending.send(CancelCommand(id=pending.command.id))
            self._open_commands.fail(pending, "draining", "the server shuts down")

    async def stop(self) -> None:
        await asyncio.gather(*(worker.transport.stop() for worker in self._placement.workers))
        for task in self._tasks:
            task.cancel()
        for pending in self._open_commands:
            self._open_commands.fail(pending, "worker_failed", "the server stopped")

    def kill(self) -> None:
        for worker in self._placement.workers:
            worker.transport.kill()

    # Requests

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Room for one HTTP request, taken before its body is read; raises OverloadedError."""
        self._check(self._reserved.has_slot)
        with self._reserved.slot():
            yield

    async def generate(
        self, commands: Sequence[GenerateCommand], *, model: str, arrived: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Every event of these commands, each ending with a FinishedEvent or FailedEvent.

        Room is taken at the first step of the iterator and given back when it is closed, so close it
        (`contextlib.aclosing`). `model` is the served id, `arrived` the request's arrival (monotonic
        seconds). Raises OverloadedError.
        """
        stream = self._open(commands, model, arrived)
        turn = Turn()
        try:
            while stream.open_ids or not stream.events.empty():
                event = await stream.events.get()
                yield event
                await turn.pass_on()
        finally:
            self._close(stream)

    def finish(self, command_id: str, choice: int, num_tokens: int) -> None:
        """The text of a choice ended with its first `num_tokens` tokens."""
        pending = self._open_commands.get(command_id)
        if pending is not None:
            pending.send(FinishCommand(id=command_id, choice=choice, num_tokens=num_tokens))

    def _check(self, has_room: bool) -> None:
        reason = self.refusal or (None if has_room else "queue_full")
        if reason is not None:
            raise OverloadedError(reason)

    def _open(self, commands: Sequence[GenerateCommand], model: str, arrived: float) -> Stream:
        wanted = Reservation.of(commands)
        self._check(self.model is not None and self._reserved.fits(wanted, self.model.max_model_len))
        self._reserved.take(wanted)
        self._record_reserved()
        stream = Stream(wanted, {command.id for command in commands})
        for command in commands:
            pending = Pending(command, stream, model, arrived)
            self._open_commands.add(pending)
            self._placement.place(pending, time.monotonic())
        return stream

    def _close(self, stream: Stream) -> None:
        """What is still open goes on as an abort: its FinishedEvent closes the books."""
        self._reserved.give_back(stream.reservation)
        self._record_reserved()
        for command_id in list(stream.open_ids):
            pending = self._open_commands.get(command_id)
            assert pending is not None
            pending.abandoned = True
            if pending.worker is None:
                self._open_commands.end(pending, FinishReason.ABORT)
            else:
                pending.send(CancelCommand(id=command_id))

    # Events

    def _on_event(self, worker: WorkerState, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._open_commands.on_step(event)
        elif isinstance(event, StepStatsEvent):
            self._on_stats(worker, event)
        elif isinstance(event, EnergyEvent):
            self.metrics.record_energy(event, worker.name, self._config.target_id)
        elif isinstance(event, FinishedEvent):
            self._open_commands.on_finished(event)
        elif isinstance(event, FailedEvent):
            if pending := self._open_commands.get(event.id):
                self._open_commands.fail(pending, event.code, event.message)
        elif isinstance(event, ReadyEvent):
            self._spawn(self._on_ready(worker, event, worker.num_deaths))
        elif isinstance(event, FatalEvent):
            self._on_fatal(event)
        elif isinstance(event, LoadingEvent):
            worker.note_loading(time.monotonic())
            log.info("loading", stage=event.stage, worker=worker.name)

    def _on_fatal(self, event: FatalEvent) -> None:
        self._fatal = self._fatal or event
        self._failed.set()

    async def _on_ready(self, worker: WorkerState, event: ReadyEvent, num_deaths: int) -> None:
        if self.codec is None:
            try:
                self.codec = await asyncio.to_thread(TextCodec.from_file, event.tokenizer_file)
            except Exception as error:  # tokenizers raises nothing more special
                log.error("tokenizer_failed", file=event.tokenizer_file, reason=str(error))
                message = f"{event.tokenizer_file} is no tokenizer that can be read: fetch the model again"
                self._on_fatal(FatalEvent(message=message, exit_code=2))
                return
            self.template = compile_template(event)
        if worker.num_deaths > num_deaths:
            return  # it died while the tokenizer was read; its successor will tell
        worker.ready = self.model = event
        self.metrics.record_ready(event, worker.name)
        self._ready.set()
        self._placement.dispatch(time.monotonic())

    def _on_lost(self, worker: WorkerState) -> None:
        """Who had sent nothing is served by another worker, or by the next one; the others are told."""
        now = time.monotonic()
        victims = worker.lose(now)
        self.metrics.worker_up.labels(worker.name).set(0)
        self.metrics.worker_restarts.labels(worker.name).inc()
        self._record_rows()
        log.error("worker_died", worker=worker.name, commands=len(victims))
        if self._placement.note_death(now):
            message = f"{self._placement.storm}: the log says of what"
            self._on_fatal(FatalEvent(message=message, exit_code=1))
        self._placement.place_again(
            [pending for pending in victims if self._open_commands.survives(pending)], now
        )
        if self._fatal is not None:
            for pending in self._open_commands:
                self._open_commands.fail(pending, "worker_failed", "workers die again and again")

    def _on_stats(self, worker: WorkerState, event: StepStatsEvent) -> None:
        worker.note_step(event, time.monotonic())
        self.metrics.record_step(event, worker.name, self._config.target_id)
        self._record_rows()

    def _record_reserved(self) -> None:
        self.metrics.reserved_tokens.labels(self._config.target_id).set(self._reserved.num_tokens)

    def _record_rows(self) -> None:
        workers, model = self._placement.workers, self._config.target_id
        self.metrics.requests_running.labels(model).set(sum(each.num_running for each in workers))
        self.metrics.requests_waiting.labels(model).set(sum(each.num_waiting for each in workers))
