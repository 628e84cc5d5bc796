"""What the pool remembers of a command between its start and its end."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from decoding import FinishReason
from server.messages import Command, FailedEvent, FinishedEvent, GenerateCommand, StepEvent
from server.metrics import Metrics
from server.reservations import Reservation

if TYPE_CHECKING:
    from server.placement import WorkerState

GenerationEvent = StepEvent | FinishedEvent | FailedEvent

# A prompt with several choices ended as its most notable choice did.
NOTABLE = (FinishReason.ERROR, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP)


class Worker(Protocol):
    """A transport to one worker; `server.supervisor` has the local one."""

    def start(self) -> None: ...
    def send(self, command: Command) -> None: ...
    async def stop(self) -> None: ...
    def replace(self) -> None:
        """End the process at once, as a death: another one is started."""

    def kill(self) -> None: ...


@dataclass(slots=True)
class Stream:
    """The events of one `generate` call that its consumer has not taken yet."""

    reservation: Reservation
    open_ids: set[str]
    events: "asyncio.Queue[GenerationEvent]" = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class ChoiceClock:
    """Monotonic seconds of one choice's first and last event, and its tokens."""

    first: float
    last: float
    num_tokens: int


@dataclass(slots=True, eq=False)
class Pending:
    """A command on its way: who waits for it and since when (monotonic seconds), and who has it.

    `begun` says that some of it was sent on, `abandoned` that nobody waits for it any more.
    """

    command: GenerateCommand
    stream: Stream
    model: str
    arrived: float
    worker: "WorkerState | None" = None
    begun: bool = False
    abandoned: bool = False
    num_deaths: int = 0
    clocks: dict[int, ChoiceClock] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.command.config.method

    def send(self, command: Command) -> None:
        """To the worker that has it, if one has."""
        if self.worker is not None:
            self.worker.send(command)

    def record_tokens(self, metrics: Metrics, event: StepEvent, now: float) -> None:
        if not event.token_ids:
            return
        if not self.clocks:
            metrics.first_token_seconds.labels(self.method).observe(now - self.arrived)
        clock = self.clocks.get(event.choice)
        if clock is None:
            self.clocks[event.choice] = ChoiceClock(now, now, len(event.token_ids))
            return
        metrics.inter_token_seconds.labels(self.method).observe(now - clock.last)
        clock.last = now
        clock.num_tokens += len(event.token_ids)

    def record_end(self, metrics: Metrics, event: FinishedEvent, now: float) -> None:
        reason = next(reason for reason in NOTABLE if reason in event.finish_reasons)
        metrics.record_end(event.stats, str(reason), self.model, self.method)
        metrics.request_seconds.labels(self.method).observe(now - self.arrived)
        for clock in self.clocks.values():
            if clock.num_tokens > 1:
                per_token = (clock.last - clock.first) / (clock.num_tokens - 1)
                metrics.per_token_seconds.labels(self.method).observe(per_token)
