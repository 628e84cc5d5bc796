"""The engine loop of a worker: commands in, events out, one engine step after another."""

import queue
import time
from collections.abc import Iterable
from collections.abc import Sequence as Series
from typing import Protocol

import structlog

from decoding import FinishReason, ForwardTime, Retreat, Sequence, SequenceOutput, StepStats
from server.energy import DECODE, PREFILL, EnergyMeter
from server.ledger import Choice, Ticket
from server.link import Outbox
from server.messages import (
    CancelCommand,
    Command,
    FailedEvent,
    FinishCommand,
    ForwardStats,
    GenerateCommand,
    StepStatsEvent,
    StopCommand,
)

# What its lost sequences are told of a step that raised: the code for the client, the words of the log.
FAILURES = {
    "out_of_memory": ("out_of_memory", "it does not fit the memory even alone"),
    "draft_failed": ("worker_failed", "the draft failed"),
}

log = structlog.get_logger("server.worker")


class EngineLike(Protocol):
    """What the loop needs of `decoding.Engine`; tests script it."""

    def add(self, sequence: Sequence) -> None: ...
    def cancel(self, sequence_id: str) -> bool: ...
    def step(self) -> Iterable[SequenceOutput]: ...
    def has_work(self) -> bool: ...
    def cache_usage(self) -> dict[str, float]: ...
    def retreat(self, error: Exception) -> Retreat | None: ...
    def is_device_lost(self, error: Exception) -> bool: ...
    @property
    def draft_enabled(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def last_step(self) -> StepStats: ...


class Tick:
    """Put into the inbox once a second where energy is measured, so that idle time is counted too."""


class WorkerLoop:
    """The engine loop: take what was asked, step, report, until told to stop."""

    def __init__(
        self,
        engine: EngineLike,
        inbox: "queue.SimpleQueue[Command | Tick]",
        outbox: Outbox,
        meter: EnergyMeter | None = None,
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._meter = meter
        self._tickets: dict[str, Ticket] = {}
        self._choices: dict[str, tuple[Ticket, Choice]] = {}

    def run(self) -> None:
        """Raises OSError when the link is down, and whatever the engine raises when it cannot go on."""
        while self._handle_commands():
            if self._engine.has_work():
                self._step()
            self._outbox.flush(wait=not self._engine.has_work())

    def _handle_commands(self) -> bool:
        """Handle what is there, or wait for something when idle; False after a stop command."""
        handled = False
        while True:
            try:
                command = self._inbox.get(block=not handled and not self._engine.has_work())
            except queue.Empty:
                break
            if isinstance(command, StopCommand):
                return False
            if isinstance(command, Tick):
                self._report_energy()
            else:
                self._handle(command)
            handled = True
        if handled and not self._engine.has_work():
            self._report(StepStats())
        return True

    def _handle(self, command: Command) -> None:
        if isinstance(command, GenerateCommand):
            self._generate(command)
        elif isinstance(command, CancelCommand):
            self._cancel(command)
        elif isinstance(command, FinishCommand):
            self._finish(command)

    def _generate(self, command: GenerateCommand) -> None:
        ticket = Ticket.open(command, time.monotonic())
        added: list[str] = []
        try:
            for sequence in ticket.sequences():
                self._engine.add(sequence)
                added.append(sequence.id)
        except ValueError as error:
            for sequence_id in added:
                self._engine.cancel(sequence_id)
            self._outbox.put(FailedEvent(id=command.id, code="invalid_value", message=str(error)))
            return
        self._tickets[command.id] = ticket
        if self._meter is not None:
            self._meter.open(command.id, command.config.method)
        for choice in ticket.choices:
            self._choices[choice.sequence_id] = ticket, choice

    def _cancel(self, command: CancelCommand) -> None:
        ticket = self._tickets.get(command.id)
        if ticket is None:
            return
        for choice in ticket.choices:
            if choice.finished is None:
                self._end_choice(ticket, choice, FinishReason.ABORT)
        self._close_if_finished(ticket)

    def _finish(self, command: FinishCommand) -> None:
        ticket = self._tickets.get(command.id)
        choice = ticket.choice(command.choice) if ticket else None
        if ticket is None or choice is None or choice.finished is not None:
            return
        cut = command.num_tokens < len(choice.log_probs)
        reason = FinishReason.STOP if cut or choice.decoded is None else choice.decoded
        self._end_choice(ticket, choice, reason, command.num_tokens)
        self._close_if_finished(ticket)

    def _end_choice(
        self, ticket: Ticket, choice: Choice, reason: FinishReason, num_tokens: int | None = None
    ) -> None:
        if choice.decoded is None:
            self._engine.cancel(choice.sequence_id)
        choice.end(reason, num_tokens)

    def _close_if_finished(self, ticket: Ticket) -> None:
        if ticket.is_finished:
            energy = None if self._meter is None else self._meter.close(ticket.command.id)
            self._outbox.put(ticket.finished_event(time.monotonic(), energy))
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.command.id, None)
        if self._meter is not None:
            self._meter.forget(ticket.command.id)
        for choice in ticket.choices:
            self._choices.pop(choice.sequence_id, None)

    def _step(self) -> None:
        started = time.monotonic()
        try:
            outputs = list(self._engine.step())
        except Exception as error:
            log.exception("step_failed", sequences=len(self._choices))
            if self._engine.is_device_lost(error):
                raise
            self._recover(error)
            return
        last = self._engine.last_step
        self._note_started([*last.admitted_ids, *(output.id for output in outputs)], started)
        self._meter_step(last)
        for output in outputs:
            self._deliver(output)
        self._report(last)

    def _meter_step(self, last: StepStats) -> None:
        """Who the step worked for: noted before its outputs end any of them."""
        if self._meter is None:
            return
        for sequence_id, seconds in last.prefills:
            self._meter.note(PREFILL, seconds, [self._command_id(sequence_id)])
        self._meter.note(DECODE, last.decode_seconds, [self._command_id(each) for each in last.decode_ids])
        self._meter.sample_if_due()

    def _command_id(self, sequence_id: str) -> str:
        return self._choices[sequence_id][0].command.id if sequence_id in self._choices else ""

    def _report_energy(self) -> None:
        if self._meter is not None:
            self._meter.sample_if_due()
            self._outbox.put(self._meter.take())

    def _deliver(self, output: SequenceOutput) -> None:
        if output.id not in self._choices:
            return  # another choice of its command failed in this step
        ticket, choice = self._choices[output.id]
        if output.finish_reason is FinishReason.ERROR:
            self._fail(ticket, "numerical_error", "a model gave values that are not numbers")
            return
        choice.record(output)
        self._outbox.put(ticket.step_event(choice, output))
        if choice.decoded is not None and not ticket.command.confirm_end:
            choice.end(choice.decoded)
            self._close_if_finished(ticket)

    def _note_started(self, sequence_ids: Iterable[str], now: float) -> None:
        for sequence_id in sequence_ids:
            if sequence_id in self._choices and self._choices[sequence_id][0].started is None:
                self._choices[sequence_id][0].started = now

    def _recover(self, error: Exception) -> None:
        """After a step that raised: what can go on does, with less at once or without the draft."""
        retreat = self._engine.retreat(error)
        if retreat is None:
            self._fail_everything()
            return
        log.error(retreat.cause, lost=len(retreat.lost), draft_enabled=self._engine.draft_enabled)
        code, reason = FAILURES[retreat.cause]
        for sequence_id in retreat.lost:
            if sequence_id in self._choices:
                self._fail(self._choices[sequence_id][0], code, reason)
        self._report(StepStats(), out_of_memory=retreat.cause == "out_of_memory")

    def _fail_everything(self) -> None:
        """A broken step may have left any row half done: all of them end here, the process goes on."""
        for ticket in list(self._tickets.values()):
            self._fail(ticket, "worker_failed", "a step failed")
        self._report(StepStats())

    def _fail(self, ticket: Ticket, code: str, message: str) -> None:
        for choice in ticket.choices:
            self._engine.cancel(choice.sequence_id)
        self._outbox.put(FailedEvent(id=ticket.command.id, code=code, message=message))
        self._forget(ticket)

    def _report(self, last: StepStats, *, out_of_memory: bool = False) -> None:
        """What the step did, and the state that it or commands left behind."""
        self._outbox.put(
            StepStatsEvent(
                method=last.method,
                preset=last.preset,
                num_sequences=last.num_sequences,
                num_tree_nodes=last.num_tree_nodes,
                prefill_tokens=last.prefill_tokens,
                prefill_seconds=last.prefill_seconds,
                decode_seconds=last.decode_seconds,
                num_running=self._engine.num_running,
                num_waiting=self._engine.num_waiting,
                cache_usage=self._engine.cache_usage(),
                draft_enabled=self._engine.draft_enabled,
                prompt_tokens=last.prompt_tokens,
                cached_prompt_tokens=last.cached_prompt_tokens,
                out_of_memory=out_of_memory,
                forward=_forward_stats(last.forward_times),
            )
        )


def _forward_stats(times: Series[ForwardTime]) -> list[ForwardStats]:
    return [ForwardStats(each.role, each.phase, each.method, each.num_passes, each.seconds) for each in times]
