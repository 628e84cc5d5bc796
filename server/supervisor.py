"""The life of one worker process: start, read its frames, notice its death, start it again, stop it."""

import asyncio
import contextlib
import math
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import structlog

from server.config import WORKER_LINK_FLAG, ServerConfig, worker_environment
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
    encode_frame,
    frame_length,
)
from server.turns import Turn

WORKER_COMMAND = (sys.executable, "-m", "server.worker")
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0
STABLE_SECONDS = 10.0  # having been ready for as long as this starts the backoff anew
STOP_GRACE_SECONDS = 2.0
EXIT_GRACE_SECONDS = 1.0  # from the end of its link to the end of a dying worker
STDERR = 2

log = structlog.get_logger("server.supervisor")


LOADED_SETTINGS = ("device", "dtype", "max_model_len", "max_num_seqs", "num_workers", "energy_source")


def load_command(config: ServerConfig, index: int) -> LoadCommand:
    """What worker number `index` is told to load."""
    return LoadCommand(
        target=config.model,
        draft=config.speculative_config.model,
        worker=index,
        **{name: getattr(config, name) for name in LOADED_SETTINGS},
    )


class WorkerProcess:
    """One worker and its successors, restarted with backoff until `stop`.

    `on_event(event)` is called for every event, `on_lost()` once after each death, both in the event
    loop. A FatalEvent is the last one: such a worker is not started again.
    """

    def __init__(
        self,
        load: LoadCommand,
        on_event: Callable[[Event], None],
        on_lost: Callable[[], None],
        command_line: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._load = load
        self._on_event = on_event
        self._on_lost = on_lost
        self._command_line = command_line
        self._decoder: FrameDecoder[Event] = FrameDecoder(Event)
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = False
        self._ready_since = 0.0  # of the event loop's clock
        self._stopping = False
        self._fatal = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, command: Command) -> None:
        """Queue a command; a worker that is gone drops it, its death is told by `on_lost`."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(command))

    async def stop(self) -> None:
        """End the worker: by asking while it is ready, by force while it loads or when it is stuck."""
        self._stopping = True
        process = self._process
        if process is not None and self._ready:
            self.send(StopCommand())
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, STOP_GRACE_SECONDS)
        self.kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def replace(self) -> None:
        """End the process now, as a death: its successor is started."""
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """End the process now and reap it."""
        self._stopping = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        delay = FIRST_BACKOFF_SECONDS
        while not self._stopping:
            self._ready_since = math.inf
            await self._live()
            if self._stopping or self._fatal:
                return
            if loop.time() - self._ready_since > STABLE_SECONDS:
                delay = FIRST_BACKOFF_SECONDS
            log.error("worker_restarts", after_seconds=delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_BACKOFF_SECONDS)

    async def _live(self) -> None:
        """One process from its start to its death."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._spawn(theirs.fileno())
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            self.send(self._load)
            await self._read_events(reader)
            if not self._stopping and not self._fatal:
                self._on_lost()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, EXIT_GRACE_SECONDS)
        finally:
            self._ready = False
            self._writer.close()
            self._process.kill()
            log.info("worker_ended", pid=self._process.pid, status=self._process.wait())

    def _spawn(self, link_fd: int) -> subprocess.Popen[bytes]:
        """In its own process group: a terminal's SIGINT is for the API process alone."""
        return subprocess.Popen(  # noqa: S603 - the command line is ours
            [*self._command_line, WORKER_LINK_FLAG, str(link_fd)],
            pass_fds=(link_fd,),
            env=worker_environment(self._load.worker, self._load.num_workers),
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            process_group=0,
        )

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        """Until end of file, which is how a death is told, or a bad frame, which ends this link."""
        turn = Turn()
        try:
            while True:
                await turn.pass_on()
                header = await reader.readexactly(HEADER_BYTES)
                payload = await reader.readexactly(frame_length(header))
                self._handle(self._decoder.decode(payload))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except BadFrameError as error:
            log.error("bad_frame", reason=str(error))

    def _handle(self, event: Event) -> None:
        if isinstance(event, ReadyEvent):
            self._ready = True
            self._ready_since = asyncio.get_running_loop().time()
        self._fatal = self._fatal or isinstance(event, FatalEvent)
        self._on_event(event)
