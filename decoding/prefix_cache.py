"""Which tokens the columns of each row belong to, so that a prompt takes over what others computed."""

from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.host import to_host
from decoding.kv_cache import KVCache
from decoding.sequence import Sequence


@dataclass(slots=True)
class Held:
    """What may be copied out of a row: the first `lengths[role]` columns of each model's cache.

    `proven` once a pass over them gave numbers; `used` tells which of two was needed last, 0 is never.
    """

    lengths: list[int]
    salt: str = ""
    used: int = 0
    proven: bool = False


class PrefixCache:
    """What the rows hold, those of running sequences and those that a sequence has left behind.

    A column depends on the tokens up to its own alone, so rows whose tokens begin alike may copy each
    other's first columns. They do if their sequences have the same `cache_salt`. The columns of a row
    without a sequence stay until the row is needed: the one that was used longest ago goes first.
    """

    def __init__(self, caches: Series[KVCache], staging: int, *, enabled: bool = True) -> None:
        self._caches = caches
        self._staging = staging
        self._enabled = enabled
        columns = min(cache.capacity for cache in caches)
        self._tokens = torch.empty((staging + 1, columns), dtype=torch.int32)
        self._held = [self._nothing() for _ in range(staging + 1)]
        self._num_uses = 0

    def stage(self, token_ids: Series[int], salt: str, *, reuse: bool = True) -> None:
        """Make the longest known prefix of `token_ids` all that the staging row holds, in each cache."""
        prompt = torch.tensor(token_ids, dtype=torch.int32)
        shared = self._shared(prompt) if reuse and self._enabled else None
        for role, cache in enumerate(self._caches):
            row, length = (self._staging, 0) if shared is None else self._longest(role, shared, salt)
            if length and row != self._staging:
                cache.copy_row(row, self._staging, length)
                self._held[row].used = self._next_use()
            cache.clear_row(self._staging, kept=length)
        self._note(self._staging, prompt, salt)
        # Its columns are counted by the caches while it is prefilled.
        self._held[self._staging].lengths = [len(prompt)] * len(self._caches)

    def stage_aside(self, row: int, token_ids: Series[int], salt: str) -> None:
        """Empty a row without a sequence, in which a prompt is prefilled beside that of the staging row."""
        for cache in self._caches:
            cache.clear_row(row)
        self._note(row, torch.tensor(token_ids, dtype=torch.int32), salt)

    def inserted(self, row: int, source: int) -> None:
        """A row was filled from `source`, where it was staged; once proven it gives columns to others."""
        length = max(cache.lengths[row] for cache in self._caches)
        self._note(row, self._tokens[source, :length], self._held[source].salt)

    def prove(self, row: int) -> None:
        """A pass over all columns of a row has ended; rows without numbers are cleared behind it."""
        self._held[row].proven = True

    def is_proven(self, row: int) -> bool:
        """Whether a row holds nothing but numbers, so that it may be left as it is."""
        return self._enabled and self._held[row].proven

    def retire(self, row: int, sequence: Sequence) -> None:
        """A sequence leaves its row: all that it committed may be used from now on."""
        if not self.is_proven(row):
            self.forget(row)
            return
        token_ids = (sequence.prompt_ids + sequence.output_ids)[: sequence.num_cached]
        self._note(row, torch.tensor(token_ids, dtype=torch.int32), sequence.cache_salt)
        held = self._held[row]
        held.proven = True
        if sequence.config.uses_target and len(held.lengths) > 1:
            # The draft never ran the deepest level of its tree, so its last column may be missing.
            held.lengths[1] = max(held.lengths[1] - 1, 0)

    def rescue(self, row: int, free: Series[int]) -> None:
        """Before a row is overwritten: its columns move to the row in `free` that is missed least."""
        refuge = min(free, key=self._need, default=row)
        if self._need(refuge) < self._need(row):
            for cache, length in zip(self._caches, self._held[row].lengths, strict=True):
                cache.copy_row(row, refuge, length)
            self.move(row, refuge)

    def move(self, source: int, destination: int) -> None:
        """Columns were moved from one row to another."""
        self._held[destination] = self._held[source]
        length = max(self._held[source].lengths)
        self._tokens[destination, :length] = self._tokens[source, :length]
        self.forget(source)

    def forget(self, row: int) -> None:
        self._held[row] = self._nothing()

    def forget_all(self) -> None:
        """After a pass that broke off: any row may be half written."""
        for row in range(len(self._held)):
            self.forget(row)

    def check_integrity(self, sequences: Series[Sequence]) -> None:
        """Assert that what rows are said to hold is what their sequences, in row order, committed."""
        for row, held in enumerate(self._held[: self._staging]):
            assert held.proven or row < len(sequences) or not any(held.lengths), (row, held)
        for row, sequence in enumerate(sequences):
            held = self._held[row]
            for cache, length in zip(self._caches, held.lengths, strict=True):
                assert length <= cache.lengths[row], (row, held)
            token_ids = (sequence.prompt_ids + sequence.output_ids)[: max(held.lengths)]
            assert to_host(self._tokens[row, : len(token_ids)]) == token_ids, row

    def _nothing(self) -> Held:
        return Held([0] * len(self._caches))

    def _note(self, row: int, token_ids: Tensor, salt: str) -> None:
        if self._enabled:
            self._tokens[row, : len(token_ids)] = token_ids
            self._held[row] = Held([cache.lengths[row] for cache in self._caches], salt, self._next_use())

    def _next_use(self) -> int:
        self._num_uses += 1
        return self._num_uses

    def _shared(self, prompt: Tensor) -> list[int]:
        """How many tokens of `prompt` each row begins with, whether or not it has columns of them."""
        length = len(prompt)
        if not length:
            return [0] * len(self._held)
        places = torch.arange(length)
        same = self._tokens[:, :length] == prompt
        shared: list[int] = to_host(torch.where(same, length, places).amin(1))
        return shared

    def _longest(self, role: int, shared: list[int], salt: str) -> tuple[int, int]:
        """The row with most columns of a prompt in one cache, and how many; the staging row among equals."""
        usable = [
            min(same, held.lengths[role]) if held.salt == salt and held.proven else 0
            for same, held in zip(shared, self._held, strict=True)
        ]
        if self._held[self._staging].salt == salt:
            usable[self._staging] = min(shared[-1], self._num_staged(role))
        row = max(range(len(usable)), key=lambda each: (usable[each], each))
        return row, usable[row]

    def _need(self, row: int) -> int:
        """When a row was used last; 0 if the staging row, which is inserted next, holds all that it does."""
        held, staged = self._held[row], self._held[self._staging]
        length = max(held.lengths)
        is_staged = (
            held.salt == staged.salt
            and all(columns <= self._num_staged(role) for role, columns in enumerate(held.lengths))
            and torch.equal(self._tokens[row, :length], self._tokens[self._staging, :length])
        )
        return 0 if length == 0 or is_staged else held.used

    def _num_staged(self, role: int) -> int:
        """Columns that the staging row holds of what was staged."""
        return min(self._held[self._staging].lengths[role], self._caches[role].lengths[self._staging])
