"""Which worker has which commands: placement by free rows, what a death leaves behind, who is stuck."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.messages import Command, ReadyEvent, StepStatsEvent
from server.pending import Pending, Worker

STORM_DEATHS = 5
STORM_SECONDS = 60.0


@dataclass(slots=True)
class WorkerState:
    """One worker and its successors as the pool sees them; `moved` in monotonic seconds.

    A worker tells of every step and of every state that commands left behind, so one that has work
    and says nothing does not move: `moved` is its last word, or when it was given work. Until it is
    ready, `moved` is when its loading began.
    """

    name: str
    transport: Worker
    ready: ReadyEvent | None = None
    num_deaths: int = 0
    num_running: int = 0
    num_waiting: int = 0
    draft_enabled: bool = True
    commands: dict[str, Pending] = field(default_factory=dict)
    moved: float = 0.0

    @property
    def num_sequences(self) -> int:
        return sum(pending.command.n for pending in self.commands.values())

    @property
    def has_work(self) -> bool:
        """Not so where all is decoded and the caller only has yet to say where its text ended."""
        in_engine = self.num_running + self.num_waiting
        return in_engine > 0 or any(not pending.begun for pending in self.commands.values())

    def take(self, pending: Pending, now: float) -> None:
        if not self.has_work:
            self.moved = now
        self.commands[pending.command.id] = pending
        pending.worker = self
        self.transport.send(pending.command)

    def send(self, command: Command) -> None:
        self.transport.send(command)

    def note_step(self, event: StepStatsEvent, now: float) -> None:
        self.num_running, self.num_waiting = event.num_running, event.num_waiting
        self.draft_enabled = event.draft_enabled
        self.moved = now

    def note_loading(self, now: float) -> None:
        self.moved = now

    def is_stuck(self, now: float, step_seconds: float, load_seconds: float) -> bool:
        if self.ready is None:
            return now - self.moved > load_seconds
        return self.has_work and now - self.moved > step_seconds

    def lose(self, now: float) -> list[Pending]:
        """It died: the commands that it had."""
        victims = list(self.commands.values())
        self.moved = now
        self.ready = None
        self.num_deaths += 1
        self.num_running = self.num_waiting = 0
        self.draft_enabled = True
        self.commands.clear()
        for pending in victims:
            pending.worker = None
        return victims


class Placement:
    """The workers, and the commands for which none is ready, the longest waiting first."""

    def __init__(self) -> None:
        self.workers: list[WorkerState] = []
        self._queue: deque[Pending] = deque()
        self._deaths: list[float] = []  # of the last `STORM_SECONDS`

    @property
    def any_ready(self) -> bool:
        return any(worker.ready for worker in self.workers)

    def place(self, pending: Pending, now: float) -> None:
        self._queue.append(pending)
        self.dispatch(now)

    def place_again(self, victims: list[Pending], now: float) -> None:
        """In front of all others: they have waited already."""
        self._queue.extendleft(reversed(victims))
        self.dispatch(now)

    def dispatch(self, now: float) -> None:
        """Give what waits to the ready workers with the fewest sequences: all have equally many rows."""
        while self._queue and self.any_ready:
            ready = (worker for worker in self.workers if worker.ready)
            min(ready, key=lambda worker: worker.num_sequences).take(self._queue.popleft(), now)

    def forget(self, pending: Pending) -> None:
        if pending.worker is not None:
            pending.worker.commands.pop(pending.command.id, None)
        elif pending in self._queue:
            self._queue.remove(pending)

    def stuck(self, now: float, step_seconds: float, load_seconds: float) -> Iterator[WorkerState]:
        return (worker for worker in self.workers if worker.is_stuck(now, step_seconds, load_seconds))

    @property
    def storm_deaths(self) -> int:
        """More than when all workers of some machine die with it, and once again."""
        return max(STORM_DEATHS, 2 * len(self.workers) + 1)

    @property
    def storm(self) -> str:
        return f"{self.storm_deaths} workers died within {STORM_SECONDS:.0f} s"

    def note_death(self, now: float) -> bool:
        """Whether so many died so soon one after another that starting more helps nobody."""
        self._deaths = [each for each in self._deaths if now - each <= STORM_SECONDS] + [now]
        return len(self._deaths) >= self.storm_deaths
