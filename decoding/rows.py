"""Which sequence sits in which row, in every cache at once; rows of one preset are neighbours."""

from collections.abc import Iterator

from decoding.config import Preset
from decoding.kv_cache import KVCache
from decoding.prefix_cache import PrefixCache
from decoding.sequence import Sequence


class RowTable:
    """The active sequences, in rows 0..n-1 without gaps, so that a group's cache is one view.

    Joining or leaving moves at most one row per group. Row `staging` lies behind the others: prompts
    are prefilled there and copied from there, so choices of one prompt share its prefill. `prefixes` is
    told of every row that is filled, moved, left or needed again.
    """

    def __init__(self, caches: list[KVCache], max_num_seqs: int, prefixes: PrefixCache) -> None:
        for cache in caches:
            if cache.rows <= max_num_seqs:
                raise ValueError(f"max_num_seqs must be under the {cache.rows} rows of the caches")
        self.staging = max_num_seqs
        self.sequences: list[Sequence] = []
        self._caches = caches
        self._prefixes = prefixes

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_free(self) -> int:
        return self.staging - len(self.sequences)

    def find(self, sequence_id: str) -> int | None:
        """The row of a sequence, None if it has none."""
        return next((row for row, each in enumerate(self.sequences) if each.id == sequence_id), None)

    def groups(self) -> Iterator[tuple[Preset, slice]]:
        """Each preset with its rows, in row order."""
        start = 0
        for row in range(1, len(self.sequences) + 1):
            preset = self.sequences[start].config.preset
            if row == len(self.sequences) or self.sequences[row].config.preset != preset:
                yield preset, slice(start, row)
                start = row

    def insert(self, sequence: Sequence, source: int) -> None:
        """Put a sequence at the end of its group; its cached columns are copied from row `source`."""
        assert len(self.sequences) < min(source, self.staging)
        later = self._groups_behind(sequence.config.preset)
        hole = len(self.sequences)
        self._prefixes.rescue(hole, range(hole + 1, min(source, self.staging)))
        self.sequences.append(sequence)
        for rows in reversed(later):
            self._move(rows.start, hole)
            hole = rows.start
        self.sequences[hole] = sequence
        for cache in self._caches:
            cache.move_row(source, hole)
        self._keep_needed(hole)
        self._prefixes.inserted(hole, source)

    def remove(self, row: int) -> Sequence:
        """Take a sequence out and close the gap."""
        removed = self.sequences[row]
        self._prefixes.retire(row, removed)
        if row < len(self.sequences) - 1:
            self._prefixes.rescue(row, range(len(self.sequences), self.staging))
        own = next(rows for _, rows in self.groups() if rows.start <= row < rows.stop)
        hole = row
        for rows in [own, *self._groups_behind(removed.config.preset)]:
            if rows.stop - 1 != hole:
                self._move(rows.stop - 1, hole)
            hole = rows.stop - 1
        self.sequences.pop()
        for cache in self._caches:
            cache.lengths[hole] = 0
        return removed

    def clear(self, row: int) -> None:
        """Zero a row that may hold values that are not numbers."""
        for cache in self._caches:
            cache.clear_row(row)
        self._prefixes.forget(row)

    def set_lengths(self, rows: slice) -> None:
        """Take over what the sequences of `rows` have cached after a step."""
        for row in range(rows.start, rows.stop):
            self._keep_needed(row)
            self._prefixes.prove(row)

    def check_integrity(self) -> None:
        """Assert that groups are unbroken and that every cache holds what its sequences committed."""
        presets = [preset for preset, _ in self.groups()]
        assert len(presets) == len(set(presets)), presets
        for role, cache in enumerate(self._caches):
            cache.check_integrity([_needed(sequence, role) for sequence in self.sequences])
            assert not any(cache.lengths[len(self.sequences) : self.staging]), cache.lengths
        self._prefixes.check_integrity(self.sequences)

    def _keep_needed(self, row: int) -> None:
        for role, cache in enumerate(self._caches):
            cache.lengths[row] = _needed(self.sequences[row], role)

    def _groups_behind(self, preset: Preset) -> list[slice]:
        groups = list(self.groups())
        presets = [each for each, _ in groups]
        first = presets.index(preset) + 1 if preset in presets else len(groups)
        return [rows for _, rows in groups[first:]]

    def _move(self, source: int, destination: int) -> None:
        self.sequences[destination] = self.sequences[source]
        for cache in self._caches:
            cache.move_row(source, destination)
        self._prefixes.move(source, destination)


def _needed(sequence: Sequence, role: int) -> int:
    """Columns a sequence has committed in the target's (0) or the draft's (1) cache."""
    if role:
        return sequence.num_cached - sequence.draft_lag if sequence.config.uses_draft else 0
    return sequence.num_cached if sequence.config.uses_target else 0
