"""Whether the draft may still be used: a few failures in a short time turn it off."""

from collections import deque
from dataclasses import replace

from decoding.sequence import Sequence

MAX_FAILURES = 3
FAILURE_SECONDS = 60.0


class DraftHealth:
    """Failures of the draft over time, in monotonic seconds; once off, it stays off."""

    def __init__(self) -> None:
        self.enabled = True
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)

    def note_failure(self, now: float) -> None:
        self._failures.append(now)
        if len(self._failures) == MAX_FAILURES and now - self._failures[0] <= FAILURE_SECONDS:
            self.enabled = False


def without_draft(sequence: Sequence) -> bool:
    """Decode it with `target` from now on; not so one that asked for the draft's own text."""
    if sequence.config.uses_draft and sequence.config.uses_target:
        sequence.config = replace(sequence.config, method="target")
    return not sequence.config.uses_draft
