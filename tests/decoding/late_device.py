"""A device that works behind the host, as a GPU does, on a clock that tests move."""

from typing import Any


class LateDevice:
    """Takes work at once and has it done when somebody waits, which is all that its clock knows of time."""

    def __init__(self) -> None:
        self.now = self.queued = 0.0

    def clock(self) -> float:
        return self.now

    def finish(self, *_: Any) -> None:
        self.now, self.queued = self.now + self.queued, 0.0
