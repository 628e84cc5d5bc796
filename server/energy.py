"""Who used the energy: each interval between two readings is split over requests by their forward time.

The loop notes how long each step worked for whom; at the first step boundary after `SAMPLE_SECONDS` the
counters are read and the interval's energy is divided: a request's share is its forward time over the
interval's length, what is left is idle. All in integers, so that attributed + idle = raw, exactly.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from server.energy_source import EnergySource, EnergySourceError, Reading
from server.messages import EnergyEvent, EnergyUsage

SAMPLE_SECONDS = 0.1
RESOLUTION_INTERVALS = 10  # a request shorter than so many refreshes of the counter is little more than noise

PREFILL, DECODE = "prefill", "decode"

log = structlog.get_logger("server.energy")


@dataclass(slots=True)
class _Request:
    """What one command has used so far.

    `complete` is false once a reading was missed while it ran, `counted` true once a counter moved.
    """

    method: str
    opened: float
    microjoules: Counter[str] = field(default_factory=Counter)
    complete: bool = True
    counted: bool = False


@dataclass(frozen=True, slots=True)
class _Share:
    """Forward time of one command in the running interval."""

    command_id: str
    method: str
    phase: str


class EnergyMeter:
    """Splits what a source counts over the commands of one worker; used from the worker's loop only."""

    def __init__(self, source: EnergySource, clock: Callable[[], float] = time.monotonic) -> None:
        self.source = source
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self._shares: Counter[_Share] = Counter()  # nanoseconds
        self._last_time = clock()
        self._last: Reading | None = None
        self._raw: Counter[str] = Counter()
        self._idle: Counter[str] = Counter()
        self._attributed: Counter[tuple[str, str]] = Counter()
        self._measured = 0  # nanoseconds
        self._last = self._read()

    def open(self, command_id: str, method: str) -> None:
        measured = self._last is not None
        self._requests[command_id] = _Request(method, self._clock(), complete=measured)

    def note(self, phase: str, seconds: float, command_ids: Iterable[str]) -> None:
        """`seconds` of forward time for these commands, one entry per sequence."""
        ids = [each for each in command_ids if each in self._requests]
        for command_id in ids:
            share = _Share(command_id, self._requests[command_id].method, phase)
            self._shares[share] += int(seconds * 1e9) // len(ids)

    def close(self, command_id: str) -> EnergyUsage | None:
        """What a command used, None where a reading was missed; later shares of it count by method only.

        Where no counter moved while it ran, that it used something is known, but not how much.
        """
        if command_id not in self._requests:
            return None
        if self.source.refresh_seconds < SAMPLE_SECONDS:
            self.sample()
        request = self._requests.pop(command_id)
        if not request.complete:
            return None
        seconds = self._clock() - request.opened
        coarse = seconds < RESOLUTION_INTERVALS * self.source.refresh_seconds
        return EnergyUsage(
            source=self.source.name,
            devices=list(self.source.devices),
            prefill_microjoules=request.microjoules[PREFILL] if request.counted else None,
            decode_microjoules=request.microjoules[DECODE] if request.counted else None,
            resolution_limited=coarse or not request.counted,
        )

    def forget(self, command_id: str) -> None:
        """A command of which nobody asks any more; nothing is read for it."""
        self._requests.pop(command_id, None)

    def sample_if_due(self) -> bool:
        """Read the counters once every `SAMPLE_SECONDS`; whether they were read."""
        if self._clock() - self._last_time < SAMPLE_SECONDS:
            return False
        self.sample()
        return True

    def sample(self) -> None:
        """Read the counters and divide what they gained since the last reading."""
        now, reading = self._clock(), self._read()
        interval = int((now - self._last_time) * 1e9)
        shares, self._shares = self._shares, Counter()
        self._last_time = now
        before, self._last = self._last, reading
        if before is None or reading is None:
            for request in self._requests.values():
                request.complete = False
            return
        for request in self._requests.values():
            request.counted = request.counted or reading != before
        for device, total in reading.items():
            self._divide(device, total - before[device], shares, interval)
        self._measured += interval

    def take(self) -> EnergyEvent:
        """What was counted since the last call, and whether the source can be read."""
        event = EnergyEvent(
            source=self.source.name,
            available=self._last is not None,
            seconds=self._measured / 1e9,
            raw=dict(self._raw),
            idle=dict(self._idle),
            attributed=[(method, phase, used) for (method, phase), used in self._attributed.items()],
        )
        for counter in (self._raw, self._idle, self._attributed):
            counter.clear()
        self._measured = 0
        return event

    def _divide(self, device: str, raw: int, shares: Counter[_Share], interval: int) -> None:
        # Clocks of steps and of readings are the same, but a step's time may be rounded up.
        whole = max(interval, shares.total(), 1)
        left = raw
        for share, nanoseconds in shares.items():
            used = raw * nanoseconds // whole
            left -= used
            self._attributed[share.method, share.phase] += used
            if share.command_id in self._requests:
                self._requests[share.command_id].microjoules[share.phase] += used
        self._raw[device] += raw
        self._idle[device] += left

    def _read(self) -> Reading | None:
        try:
            return self.source.read()
        except EnergySourceError as error:
            if self._last is not None:
                log.warning("energy_lost", source=self.source.name, reason=str(error))
            return None
