"""What all transports to a worker share: one life after another with backoff, and events out of bytes."""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator

import structlog

from server.messages import (
    HEADER_BYTES,
    BadFrameError,
    Command,
    Event,
    FatalEvent,
    FrameDecoder,
    LoadCommand,
    ReadyEvent,
    StopCommand,
    frame_length,
)
from server.turns import Turn

FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0
STABLE_SECONDS = 10.0  # having been ready for as long as this starts the backoff anew
STOP_GRACE_SECONDS = 10.0  # from a stop command to the end: the running step, and unloading

log = structlog.get_logger("server.supervisor")


class FrameSplitter:
    """Cuts a stream of bytes into the bodies of its frames."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes; raises BadFrameError."""
        data, start = self._rest + data, 0
        while len(data) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            end = body + frame_length(data[start:body])
            if end > len(data):
                break
            yield data[body:end]
            start = end
        self._rest = data[start:]


class WorkerTransport(ABC):
    """One worker and its successors, restarted with backoff until told to stop.

    `on_event(event)` is called for every event, `on_lost()` once after each death, both in the event
    loop. A FatalEvent is the last one: such a worker is not started again.
    """

    def __init__(
        self, load: LoadCommand, on_event: Callable[[Event], None], on_lost: Callable[[], None]
    ) -> None:
        self._load = load
        self._on_event = on_event
        self._on_lost = on_lost
        self._decoder: FrameDecoder[Event] = FrameDecoder(Event)
        self._task: asyncio.Task[None] | None = None
        self._ready = False
        self._ready_since = 0.0  # of the event loop's clock
        self._stopping = False
        self._fatal = False
        self._told = False  # that the present life is lost

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End the worker: by asking while it is ready, by force while it loads or when it is stuck."""
        self._stopping = True
        if self._task is not None and self._ready:
            self.send(StopCommand())
            await asyncio.wait({self._task}, timeout=STOP_GRACE_SECONDS)
        self.kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @abstractmethod
    def send(self, command: Command) -> None:
        """Queue a command; a worker that is gone drops it, its death is told by `on_lost`."""

    @abstractmethod
    def kill(self) -> None:
        """End the worker now, and start no other."""

    @abstractmethod
    async def _live(self) -> None:
        """One worker from its start to its death, of which it tells; what it raises is such a death too."""

    async def _converse(self, read: Callable[[], Awaitable[bytes]]) -> None:
        """With a worker that has just started: have it load, hear it to its end, tell a death."""
        self.send(self._load)
        await self._read_events(read)
        self._tell_lost()

    def _tell_lost(self) -> None:
        """Once of each life, unless its end was wanted."""
        if not (self._stopping or self._fatal or self._told):
            self._told = True
            self._on_lost()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        delay = FIRST_BACKOFF_SECONDS
        while not self._stopping:
            self._ready_since, self._told = math.inf, False
            try:
                await self._live()
            except Exception:  # a machine without descriptors or processes left may have some again
                log.exception("transport_failed", worker=self._load.worker)
                self._tell_lost()
            if self._stopping or self._fatal:
                return
            if loop.time() - self._ready_since > STABLE_SECONDS:
                delay = FIRST_BACKOFF_SECONDS
            log.error("worker_restarts", after_seconds=delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_BACKOFF_SECONDS)

    async def _read_events(self, read: Callable[[], Awaitable[bytes]]) -> None:
        """Until end of file, which is how a death is told, or a bad frame, which ends this link."""
        turn, frames = Turn(), FrameSplitter()
        try:
            while data := await read():
                for payload in frames.push(data):
                    self._handle(self._decoder.decode(payload))
                    await turn.pass_on()
        except ConnectionError:
            return
        except BadFrameError as error:
            log.error("bad_frame", reason=str(error))

    def _handle(self, event: Event) -> None:
        if isinstance(event, ReadyEvent):
            self._ready = True
            self._ready_since = asyncio.get_running_loop().time()
        self._fatal = self._fatal or isinstance(event, FatalEvent)
        self._on_event(event)
