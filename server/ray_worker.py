"""Workers on the nodes of a Ray cluster: actors that Ray places, and places again when their node is lost.

Imported for `--worker-backend ray` only. What Ray carries are the frames of `server.messages`, as bytes.
"""

import asyncio
import contextlib
import hashlib
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import ray
import structlog
from ray.exceptions import ActorDiedError, RayError

from server.config import ServerConfig
from server.messages import Command, Event, FatalEvent, LoadCommand, ReadyEvent, encode_frame
from server.ray_actor import WorkerActor
from server.ray_nodes import Demand, NoClusterError, NodesAwaitedError
from server.supervisor import WORKER_COMMAND
from server.transport import WorkerTransport

CONNECT_SECONDS = 5.0
PLACING_SECONDS = 1.0  # between two attempts to find a node, or to reach an actor that has none yet
ENDLESS = -1

T = TypeVar("T")

log = structlog.get_logger("server.ray")


def aside(call: Callable[[], T]) -> "asyncio.Future[T]":
    """What `call` returns, on a daemon, for which nobody waits at the end: Ray may block for minutes.

    And not on the main thread, whose signals Ray would take over.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
            try:
                result = call()
            except Exception as error:
                loop.call_soon_threadsafe(settle, future.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, future.set_result, result)

    threading.Thread(target=run, daemon=True, name="ray").start()
    return future


class RayCluster:
    """The cluster as this process sees it, joined once for all of its workers."""

    def __init__(self, address: str, num_workers: int, device: str, num_gpus: int = 1) -> None:
        self._address = address
        self._demand = Demand(num_workers, device, num_gpus)
        self._joining: asyncio.Future[None] | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None

    async def options(self) -> dict[str, int]:
        """What a worker needs of the nodes there are now, as options of its actor.

        Raises NoClusterError, and NodesAwaitedError while nodes may still come. What else fails at joining
        is tried anew at the next call.
        """
        if self._joining is None or _failed_for_now(self._joining):
            self._joining = aside(self._connect)
            self._joining.add_done_callback(restore_signals)
        await asyncio.shield(self._joining)
        nodes = await aside(ray.nodes)
        resources = [node["Resources"] for node in nodes if node["Alive"]]
        return self._demand.options(resources, asyncio.get_running_loop().time())

    def _connect(self) -> None:
        try:
            if self._address != "auto":
                host, _, port = self._address.rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise NoClusterError(
                f"--ray-address {self._address}: this machine is no node of such a cluster "
                f"({type(error).__name__}); start one with: ray start --head"
            ) from error

    def keep(self, content: bytes) -> str:
        """The path of a file with this content, there until `close`."""
        self._files = self._files or tempfile.TemporaryDirectory(prefix="mmtad-")
        path = Path(self._files.name) / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return str(path)

    def close(self) -> None:
        if self._files is not None:
            self._files.cleanup()


class RayWorker(WorkerTransport):
    """A worker in an actor. A worker that dies is started again by its actor, an actor by Ray."""

    def __init__(
        self,
        load: LoadCommand,
        on_event: Callable[[Event], None],
        on_lost: Callable[[], None],
        cluster: RayCluster,
        command_line: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        super().__init__(with_whole_paths(load), on_event, on_lost)
        self._cluster = cluster
        self._command_line = command_line
        self._actor: Any = None
        self._outgoing: list[bytes] | None = None  # frames, while there is a worker
        self._has_outgoing = asyncio.Event()
        self._fetching: asyncio.Task[None] | None = None

    def send(self, command: Command) -> None:
        if self._outgoing is not None:
            self._outgoing.append(encode_frame(command))
            self._has_outgoing.set()

    async def stop(self) -> None:
        await super().stop()
        self._cluster.close()

    def replace(self) -> None:
        """End the actor now, as a death: Ray starts its successor. One without a node yet just waits."""
        if self._outgoing is not None:
            ray.kill(self._actor, no_restart=False)

    def kill(self) -> None:
        self._stopping = True
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)

    async def _live(self) -> None:
        try:
            await self._launch()
        except NoClusterError as error:
            self._handle(FatalEvent(message=str(error), exit_code=1))
            return
        self._outgoing = []
        writing = asyncio.create_task(self._write())
        try:
            await self._converse(self._read)
        finally:
            self._ready, self._outgoing = False, None
            await _cancel(writing, self._fetching)

    async def _launch(self) -> None:
        """A worker on some node, once there is one with room."""
        told = ""
        while True:
            try:
                self._actor = self._actor or self._new_actor(await self._cluster.options())
                await self._actor.launch.remote()
                return
            except (RayError, NodesAwaitedError) as error:
                if isinstance(error, ActorDiedError):
                    self._actor = None
                reason = str(error).partition("\n")[0]
                if reason != told:
                    log.warning("worker_unplaced", worker=self._load.worker, reason=reason)
                told = reason
            await asyncio.sleep(PLACING_SECONDS)

    def _new_actor(self, options: dict[str, int]) -> Any:
        actor = ray.remote(WorkerActor).options(
            max_restarts=ENDLESS,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            enable_task_events=False,
            **options,
        )
        return actor.remote(list(self._command_line))

    async def _read(self) -> bytes:
        try:
            data: bytes = await self._actor.read.remote()
        except RayError as error:
            log.error("actor_lost", worker=self._load.worker, reason=str(error).partition("\n")[0])
            return b""
        return data

    async def _write(self) -> None:
        """One call at a time, since Ray may run several in any order."""
        while self._outgoing is not None:
            await self._has_outgoing.wait()
            self._has_outgoing.clear()
            data = b"".join(self._outgoing)
            self._outgoing.clear()
            try:
                await self._actor.write.remote(data)
            except RayError:
                return  # `_read` tells

    def _handle(self, event: Event) -> None:
        """The tokenizer of a ready worker lies on its node: it is brought here first."""
        if isinstance(event, ReadyEvent):
            self._fetching = asyncio.create_task(self._fetch_tokenizer(event))
        else:
            super()._handle(event)

    async def _fetch_tokenizer(self, event: ReadyEvent) -> None:
        with contextlib.suppress(RayError):  # `_read` tells
            content = await self._actor.fetch.remote(event.tokenizer_file)
            path = await asyncio.to_thread(self._cluster.keep, content)
            super()._handle(msgspec.structs.replace(event, tokenizer_file=path))


def ray_launch(config: ServerConfig) -> Callable[..., RayWorker]:
    """What starts the workers of a server in the cluster of `--ray-address`."""
    cluster = RayCluster(config.ray_address, config.num_workers, config.device, config.tensor_parallel_size)
    return lambda load, on_event, on_lost: RayWorker(load, on_event, on_lost, cluster)


def _failed_for_now(joining: "asyncio.Future[None]") -> bool:
    error = joining.exception() if joining.done() else None
    return error is not None and not isinstance(error, NoClusterError)


def restore_signals(_: object) -> None:
    """Ray's native part takes over signals that it may not: the handlers of Python are set once more."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))
            signal.siginterrupt(number, False)


def with_whole_paths(load: LoadCommand) -> LoadCommand:
    """A node has another working directory: folders are named from the root on."""
    return msgspec.structs.replace(load, target=_whole(load.target), draft=_whole(load.draft))


def _whole(model: str | None) -> str | None:
    return model if model is None or not Path(model).exists() else str(Path(model).resolve())


async def _cancel(*tasks: "asyncio.Task[None] | None") -> None:
    known = [task for task in tasks if task is not None]
    for task in known:
        task.cancel()
    await asyncio.gather(*known, return_exceptions=True)
