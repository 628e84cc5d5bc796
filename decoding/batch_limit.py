"""How much may share a pass: less after memory ran out, more again as time passes without."""

import itertools

EASE_SECONDS = 60.0


class BatchLimit:
    """At most `most` rows, or tokens; halved by a failure, doubled after `EASE_SECONDS` without one.

    Times are monotonic seconds.
    """

    def __init__(self, most: int) -> None:
        self.size = most
        self._most = most
        self._changed = 0.0

    def halve(self, size: int, now: float) -> None:
        """A pass of `size` was too much."""
        self.size = max(1, min(self.size, size) // 2)
        self._changed = now

    def lift(self) -> None:
        """What was too much even alone is gone."""
        self.size = self._most

    def ease(self, now: float) -> bool:
        """Whether the limit was raised, because there has been memory enough for a while."""
        if self.size == self._most or now - self._changed < EASE_SECONDS:
            return False
        self.size = min(2 * self.size, self._most)
        self._changed = now
        return True

    def split(self, rows: slice) -> list[slice]:
        """The parts of a group that fit one pass, of nearly equal sizes."""
        num_rows = rows.stop - rows.start
        num_parts = -(-num_rows // self.size)
        bounds = [rows.start + part * num_rows // num_parts for part in range(num_parts + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]
