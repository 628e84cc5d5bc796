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
from typing import Any

import msgspec
import ray
import structlog
from ray.exceptions import ActorDiedError, RayError

from server.config import ServerConfig
from server.messages import Command, Event, FatalEvent, LoadCommand, ReadyEvent, encode_frame
from server.ray_actor import WorkerActor
from server.supervisor import WORKER_COMMAND
from server.transport import WorkerTransport

CONNECT_SECONDS = 5.0
PLACING_SECONDS = 1.0  # between two attempts to reach an actor that has no node yet
ENDLESS = -1

log = structlog.get_logger("server.ray")


class NoClusterError(Exception):
    """There is no cluster to join; the message is one line with the cure."""


def cores_per_worker(node_cores: Sequence[float], num_workers: int) -> int:
    """The most whole cores that each of `num_workers` can have on nodes with so many; at least 1."""
    most = int(max(node_cores, default=1))
    fitting = (
        cores for cores in range(most, 0, -1) if sum(each // cores for each in node_cores) >= num_workers
    )
    return next(fitting, 1)


def check_gpus(node_gpus: Sequence[float], num_gpus: int) -> None:
    """A worker waits for a node with a free GPU, but `num_gpus` that no node has would never come.

    Raises NoClusterError.
    """
    most = int(max(node_gpus, default=0))
    if num_gpus > 1 and most < num_gpus:
        raise NoClusterError(
            f"--tensor-parallel-size {num_gpus}: no node of the cluster has more than {most} GPUs; "
            "give a smaller number, or add a node"
        )


class RayCluster:
    """The cluster as this process sees it, joined once for all of its workers."""

    def __init__(self, address: str, num_workers: int, device: str, num_gpus: int = 1) -> None:
        self._address = address
        self._num_workers = num_workers
        self._device = device
        self._num_gpus = num_gpus
        self._joining: asyncio.Future[dict[str, Any]] | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None

    async def join(self) -> dict[str, Any]:
        """What a worker needs, as options of its actor; raises NoClusterError."""
        if self._joining is None:
            self._joining = asyncio.get_running_loop().create_future()
            # A daemon, for which nobody waits at the end: Ray may block for minutes. And not the main thread,
            # whose signals Ray would take over.
            threading.Thread(target=self._join, args=(self._joining,), daemon=True, name="ray").start()
            self._joining.add_done_callback(restore_signals)
        return await asyncio.shield(self._joining)

    def _join(self, joining: "asyncio.Future[dict[str, Any]]") -> None:
        loop = joining.get_loop()
        with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
            try:
                options = self._connect()
            except Exception as error:
                loop.call_soon_threadsafe(joining.set_exception, error)
            else:
                loop.call_soon_threadsafe(joining.set_result, options)

    def _connect(self) -> dict[str, Any]:
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
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        node_gpus = [node.get("GPU", 0) for node in nodes]
        if self._device == "cuda" or (self._device == "auto" and max(node_gpus, default=0) >= 1):
            check_gpus(node_gpus, self._num_gpus)
            return {"num_gpus": self._num_gpus, "num_cpus": self._num_gpus}
        return {"num_cpus": cores_per_worker([node.get("CPU", 0) for node in nodes], self._num_workers)}

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
            options = await self._cluster.join()
        except NoClusterError as error:
            self._handle(FatalEvent(message=str(error), exit_code=1))
            return
        await self._launch(options)
        self._outgoing = []
        writing = asyncio.create_task(self._write())
        try:
            await self._converse(self._read)
        finally:
            self._ready, self._outgoing = False, None
            await _cancel(writing, self._fetching)

    async def _launch(self, options: dict[str, Any]) -> None:
        """A worker on some node, once there is one with room."""
        told = ""
        while True:
            self._actor = self._actor or self._new_actor(options)
            try:
                await self._actor.launch.remote()
                return
            except RayError as error:
                if isinstance(error, ActorDiedError):
                    self._actor = None
                reason = str(error).partition("\n")[0]
                if reason != told:
                    log.warning("worker_unplaced", worker=self._load.worker, reason=reason)
                told = reason
            await asyncio.sleep(PLACING_SECONDS)

    def _new_actor(self, options: dict[str, Any]) -> Any:
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
