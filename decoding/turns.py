"""Which rows are decoded next: every group has its turn, the one that waited longest first."""

from collections.abc import Iterable

from decoding.batch_limit import BatchLimit
from decoding.config import Preset

Group = tuple[Preset, int]  # rows that share a pass: of one preset, and which part of them


class GroupTurns:
    """Takes turns over the groups that there are; `limit` is how many rows may share a pass."""

    def __init__(self, limit: BatchLimit) -> None:
        self._limit = limit
        self._last_turn: dict[Group, int] = {}
        self._num_turns = 0

    def next(self, presets: Iterable[tuple[Preset, slice]]) -> tuple[Group, slice] | None:
        """The group to be decoded now, of `presets` with their rows; a new one is first."""
        groups = {
            (preset, part): piece
            for preset, rows in presets
            for part, piece in enumerate(self._limit.split(rows))
        }
        if not groups:
            return None
        # Presets are many: those that no row has any more are forgotten.
        self._last_turn = {group: self._last_turn.get(group, -1) for group in groups}
        group = min(self._last_turn, key=self._last_turn.__getitem__)
        self._num_turns += 1
        self._last_turn[group] = self._num_turns
        return group, groups[group]
