"""Times the passes of the models: whose they were, in which phase, how many seconds of the device."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, TypeVar

import torch

from decoding.statistics import ForwardTime, Phase

Mark = float | torch.cuda.Event
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def timed(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> tuple[Result, float]:
    """What the function returns, and the wall seconds that it took."""
    started = time.monotonic()
    result = function(*args, **kwargs)
    return result, time.monotonic() - started


def cost_clock(device: torch.device, ranks: int) -> Callable[[], float]:
    """What costs on `device` are measured with: of a CPU only the time that this process had.

    Who else runs on its cores would otherwise make one shape look dearer than another. Where the target
    has several `ranks`, what this process waits for counts too.
    """
    return time.monotonic if device.type == "cuda" or ranks > 1 else time.process_time


def finish_queued(device: torch.device) -> None:
    """Wait for what `device` was given so far, so that a clock begins, or ends, with it: nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PassTimer:
    """Marks the start and the end of every pass of one model, without waiting for its device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passes: list[tuple[Mark, Mark]] = []

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        start = self._mark()
        yield
        self._passes.append((start, self._mark()))

    def take(self) -> list[tuple[Mark, Mark]]:
        """The passes since the last call."""
        passes, self._passes = self._passes, []
        return passes

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class StepTimer:
    """The passes of one engine step, charged to sequences as they are made, summed at its end."""

    def __init__(self, timers: Mapping[str, PassTimer]) -> None:
        self._timers = dict(timers)
        self._charged: list[tuple[str, Phase, str, list[tuple[Mark, Mark]], tuple[str, ...]]] = []

    def begin(self) -> None:
        """Forget what a broken step, or whoever else ran the models, left behind."""
        self._charged.clear()
        for timer in self._timers.values():
            timer.take()

    def charge(self, phase: Phase, method: str, sequence_ids: tuple[str, ...]) -> None:
        """What was run since the last charge was run for these sequences."""
        for role, timer in self._timers.items():
            if passes := timer.take():
                self._charged.append((role, phase, method, passes, sequence_ids))

    def end(self) -> tuple[ForwardTime, ...]:
        """Call when the step's results are on the host; a step without any waits for its last pass here."""
        return tuple(
            ForwardTime(role, phase, method, len(passes), sum(map(_seconds, passes)), sequence_ids)
            for role, phase, method, passes, sequence_ids in self._charged
        )


def _seconds(marks: tuple[Mark, Mark]) -> float:
    start, end = marks
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)  # noqa: PT018 - for the type checker
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
