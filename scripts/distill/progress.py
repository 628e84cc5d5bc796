"""One line that tells how far a run is."""

import sys
import time
from typing import TextIO

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """Rewrites one line on a terminal; elsewhere writes one every half minute."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._rewrites = self._stream.isatty()
        self._last = -SECONDS_BETWEEN_LINES
        self._width = 0

    def show(self, what: str, *, tokens: int, seconds: float, left: float, note: str = "") -> None:
        """`tokens` done in `seconds` of this phase, `left` seconds to go."""
        now = time.monotonic()
        if now - self._last < (SECONDS_BETWEEN_UPDATES if self._rewrites else SECONDS_BETWEEN_LINES):
            return
        self._last = now
        rate = tokens / max(seconds, 1e-9)
        self._write(f"{what}: {tokens:,} tokens, {rate:,.0f} tokens/s, {_clock(left)} left{note}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._write(line)
        if self._rewrites:
            self._stream.write("\n")
        self._width = 0

    def _write(self, line: str) -> None:
        padded = line.ljust(self._width)
        self._stream.write(f"\r{padded}" if self._rewrites else f"{line}\n")
        self._stream.flush()
        self._width = len(line)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02}"
