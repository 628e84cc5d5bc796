"""How often a long prompt may have a chunk prefilled beside rows that are decoded."""


class PrefillShare:
    """A chunk, then as many seconds for everybody else as it took: each side has half of the time.

    A chunk of a long prompt may take as long as many steps of the rows that run; they must not wait for
    one such chunk after another.
    """

    def __init__(self) -> None:
        self._owed = 0.0  # seconds

    def allows(self, *, others: bool) -> bool:
        """Whether the next chunk may be prefilled now; always where there are no `others`."""
        return not others or self._owed <= 0

    def note(self, chunk_seconds: float, other_seconds: float) -> None:
        """A step ended, with or without a chunk of a long prompt."""
        owed = chunk_seconds if chunk_seconds > 0 else self._owed
        self._owed = max(0.0, owed - other_seconds)
