"""What accepted requests hold until they end, and the bounds on it: slots, sequences, tokens."""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from server.config import ServerConfig
from server.messages import GenerateCommand


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one request may come to: its choices, and for each its prompt and all it may answer."""

    num_sequences: int
    num_tokens: int

    @classmethod
    def of(cls, commands: Iterable[GenerateCommand]) -> "Reservation":
        sizes = [(each.n, len(each.prompt_ids) + each.params.max_tokens) for each in commands]
        return cls(sum(n for n, _ in sizes), sum(n * num_tokens for n, num_tokens in sizes))


class Reservations:
    """Counts and bounds; `idle` is set while no request is there.

    Rows hold what is decoded, so the bounds are what all rows hold and what may wait for them. Checking
    and taking happen without a switch to another task, so a burst cannot get past them.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.num_slots = 0
        self.num_sequences = 0
        self.num_tokens = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._num_rows = config.num_workers * config.max_num_seqs
        self._queued_sequences = config.max_num_queued_reqs
        self._queued_tokens = config.max_num_queued_tokens

    @property
    def has_slot(self) -> bool:
        return self.num_slots < self._num_rows + self._queued_sequences

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        self.num_slots += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.num_slots -= 1
            if self.num_slots == 0:
                self.idle.set()

    def fits(self, wanted: Reservation, max_model_len: int) -> bool:
        """A request larger than all there is still gets its turn when it is alone."""
        most_sequences = self._num_rows + self._queued_sequences
        most_tokens = self._num_rows * max_model_len + self._queued_tokens
        return self.num_sequences == 0 or (
            self.num_sequences + wanted.num_sequences <= most_sequences
            and self.num_tokens + wanted.num_tokens <= most_tokens
        )

    def take(self, wanted: Reservation) -> None:
        self.num_sequences += wanted.num_sequences
        self.num_tokens += wanted.num_tokens

    def give_back(self, held: Reservation) -> None:
        self.num_sequences -= held.num_sequences
        self.num_tokens -= held.num_tokens
