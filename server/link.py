"""The worker's end of the link: a blocking socket read by one thread and written by the engine loop."""

import socket
from collections import deque

import msgspec

from server.messages import (
    HEADER_BYTES,
    Command,
    Event,
    FrameDecoder,
    StepEvent,
    StepStatsEvent,
    TopLogProbs,
    encode_frame,
    frame_length,
)

MAX_PENDING_STEP_STATS = 1024

_commands: FrameDecoder[Command] = FrameDecoder(Command)


def receive_command(link: socket.socket) -> Command | None:
    """The next command, or None at end of file; raises BadFrameError."""
    header = _receive_exactly(link, HEADER_BYTES)
    if header is None:
        return None
    payload = _receive_exactly(link, frame_length(header))
    return None if payload is None else _commands.decode(payload)


def _receive_exactly(link: socket.socket, count: int) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < count:
        try:
            chunk = link.recv(count - len(chunks))
        except ConnectionError:
            return None
        if not chunk:
            return None
        chunks += chunk
    return bytes(chunks)


class Outbox:
    """Events on their way to the API process, merged per choice while it does not read.

    Memory is bounded by the text of the running requests: a `StepEvent` joins the unsent one of its
    choice, and of the step statistics only the last `MAX_PENDING_STEP_STATS` are kept.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._steps: dict[tuple[str, int], StepEvent] = {}
        self._ends: list[Event] = []
        self._stats: deque[StepStatsEvent] = deque(maxlen=MAX_PENDING_STEP_STATS)
        self._partial = memoryview(b"")

    def put(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._put_step(event)
        elif isinstance(event, StepStatsEvent):
            self._stats.append(event)
        else:
            self._ends.append(event)

    def _put_step(self, event: StepEvent) -> None:
        key = event.id, event.choice
        earlier = self._steps.get(key)
        if earlier is not None:
            event = msgspec.structs.replace(
                event,
                token_ids=earlier.token_ids + event.token_ids,
                log_probs=earlier.log_probs + event.log_probs,
                draft_positions=earlier.draft_positions
                + [len(earlier.token_ids) + position for position in event.draft_positions],
                top_log_probs=_joined(earlier.top_log_probs, event.top_log_probs),
                prompt_log_probs=earlier.prompt_log_probs or event.prompt_log_probs,
            )
        self._steps[key] = event

    def flush(self, *, wait: bool) -> None:
        """Send what the socket takes; with `wait`, everything.

        A choice's tokens go before the end of its command. Raises OSError when the link is down.
        """
        while True:
            if not self._partial and not self._encode_pending():
                return
            flags = 0 if wait else socket.MSG_DONTWAIT
            try:
                sent = self._link.send(self._partial, flags)
            except BlockingIOError:
                return
            self._partial = self._partial[sent:]

    def _encode_pending(self) -> bool:
        events: list[Event] = [*self._steps.values(), *self._ends, *self._stats]
        self._steps.clear()
        self._ends.clear()
        self._stats.clear()
        self._partial = memoryview(b"".join(encode_frame(event) for event in events))
        return bool(events)


def _joined(earlier: list[TopLogProbs] | None, later: list[TopLogProbs] | None) -> list[TopLogProbs] | None:
    return later if earlier is None else earlier + (later or [])
