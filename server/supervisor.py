"""The life of one worker process: start, read its frames, notice its death, start it again, stop it."""

import asyncio
import contextlib
import functools
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import structlog

from server.config import WORKER_LINK_FLAG, ServerConfig, worker_environment
from server.messages import Command, Event, LoadCommand, encode_frame
from server.pending import Worker
from server.transport import STOP_GRACE_SECONDS, WorkerTransport

WORKER_COMMAND = (sys.executable, "-m", "server.worker")
READ_BYTES = 64 * 1024
EXIT_GRACE_SECONDS = 1.0  # from the end of its link to the end of a dying worker
STDERR = 2

log = structlog.get_logger("server.supervisor")


LOADED_SETTINGS = (
    "device",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "enable_prefix_caching",
    "enforce_eager",
    "num_workers",
    "tensor_parallel_size",
    "energy_source",
)


def load_command(config: ServerConfig, index: int) -> LoadCommand:
    """What worker number `index` is told to load."""
    return LoadCommand(
        target=config.model,
        draft=config.speculative_config.model,
        worker=index,
        decoding=config.decoding,
        **{name: getattr(config, name) for name in LOADED_SETTINGS},
    )


def launch_of(config: ServerConfig, local: Callable[..., Worker]) -> Callable[..., Worker]:
    """What starts workers where `--worker-backend` says, on this machine `local`."""
    if config.worker_backend == "local":
        return local
    from server.ray_worker import ray_launch  # an optional package, which takes a second to import

    return ray_launch(config)


def spawn_worker(
    command_line: Sequence[str], link: socket.socket, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """A worker with `link`, in a process group of its own: a terminal's SIGINT is for its parent alone."""
    return subprocess.Popen(  # noqa: S603 - the command line is ours
        [*command_line, WORKER_LINK_FLAG, str(link.fileno())],
        pass_fds=(link.fileno(),),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=STDERR,
        process_group=0,
    )


class WorkerProcess(WorkerTransport):
    """A child process of this one, reached over a socketpair."""

    def __init__(
        self,
        load: LoadCommand,
        on_event: Callable[[Event], None],
        on_lost: Callable[[], None],
        command_line: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        super().__init__(load, on_event, on_lost)
        self._command_line = command_line
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(command))

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

    async def _live(self) -> None:
        """One process from its start to its death."""
        reader, self._writer, self._process = await self._start_process()
        try:
            await self._converse(functools.partial(reader.read, READ_BYTES))
            grace = STOP_GRACE_SECONDS if self._stopping else EXIT_GRACE_SECONDS
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, grace)
        finally:
            self._ready = False
            self._writer.close()
            self._process.kill()
            log.info("worker_ended", pid=self._process.pid, status=self._process.wait())

    async def _start_process(
        self,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, "subprocess.Popen[bytes]"]:
        """A process and our end of its link; nothing is left of them where one cannot be had."""
        load = self._load
        environment = worker_environment(load.worker, load.num_workers, load.tensor_parallel_size)
        ours, theirs = socket.socketpair()
        process = None
        try:
            with theirs:
                process = spawn_worker(self._command_line, theirs, environment)
            return *await asyncio.open_connection(sock=ours), process
        except BaseException:
            ours.close()
            if process is not None:
                process.kill()
                process.wait()
            raise
