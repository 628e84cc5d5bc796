"""The commands that are open: who gets their events, how they end, and what of that is counted."""

import hashlib
import time
from collections.abc import Iterator

import structlog

from decoding import FinishReason
from server.messages import FailedEvent, FinishedEvent, StepEvent
from server.metrics import Metrics
from server.pending import Pending
from server.placement import Placement

MAX_DEATHS = 2  # of workers that had a command; after them it is taken for the cause

log = structlog.get_logger("server.pool")


class OpenCommands:
    """Every command between `add` and its end, which it has exactly once."""

    def __init__(self, metrics: Metrics, placement: Placement) -> None:
        self._metrics = metrics
        self._placement = placement
        self._pending: dict[str, Pending] = {}

    def __iter__(self) -> Iterator[Pending]:
        """Those open now; they may end meanwhile."""
        return iter(list(self._pending.values()))

    def get(self, command_id: str) -> Pending | None:
        return self._pending.get(command_id)

    def add(self, pending: Pending) -> None:
        self._pending[pending.command.id] = pending

    def on_step(self, event: StepEvent) -> None:
        pending = self.get(event.id)
        if pending is None:
            return
        pending.begun = True
        pending.record_tokens(self._metrics, event, time.monotonic())
        pending.stream.events.put_nowait(event)

    def on_finished(self, event: FinishedEvent) -> None:
        pending = self.get(event.id)
        if pending is None:
            return
        pending.record_end(self._metrics, event, time.monotonic())
        self._forget(pending)
        self._deliver_end(pending, event)

    def fail(self, pending: Pending, code: str, message: str) -> None:
        log.error("request_failed", command=pending.command.id, code=code, reason=message)
        self.end(pending, FinishReason.ERROR)
        self._deliver_end(pending, FailedEvent(id=pending.command.id, code=code, message=message))

    def end(self, pending: Pending, reason: FinishReason) -> None:
        """The end of a command of which no worker told."""
        self._forget(pending)
        self._metrics.requests.labels(pending.model, pending.method, str(reason)).inc()

    def survives(self, pending: Pending) -> bool:
        """Whether a command may be tried again after the death of its worker; ends it otherwise."""
        pending.num_deaths += 1
        if pending.abandoned:
            self.end(pending, FinishReason.ABORT)
        elif pending.num_deaths >= MAX_DEATHS:
            content = hashlib.sha256(repr(pending.command.prompt_ids).encode()).hexdigest()
            log.error("present_at_deaths", command=pending.command.id, prompt_sha256=content)
            self.fail(pending, "worker_failed", f"{MAX_DEATHS} workers died with it")
        elif pending.begun:
            self.fail(pending, "worker_failed", "the worker died")
        else:
            log.warning("request_retried", command=pending.command.id)
            return True
        return False

    def _forget(self, pending: Pending) -> None:
        del self._pending[pending.command.id]
        self._placement.forget(pending)

    def _deliver_end(self, pending: Pending, event: FinishedEvent | FailedEvent) -> None:
        pending.stream.open_ids.discard(pending.command.id)
        pending.stream.events.put_nowait(event)
