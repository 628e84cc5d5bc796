"""What a Ray actor does: it runs one worker process on its node and passes its bytes on, unread."""

import asyncio
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from server.config import worker_environment
from server.supervisor import READ_BYTES, spawn_worker


class WorkerActor:
    """One worker process after another, and both ends of its link.

    The worker is a process of its own, so that a step that holds the interpreter holds up no bytes, and
    that it ends with its actor: by the end of its link. Ray gives the actor its GPU and its cores by
    environment variables, which the worker inherits.
    """

    def __init__(self, command_line: Sequence[str]) -> None:
        self._command_line = command_line
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def launch(self) -> None:
        """Start a worker; one that still runs is ended first."""
        self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = spawn_worker(self._command_line, theirs, worker_environment())
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    async def read(self) -> bytes:
        """What the worker has written since, b"" once it has ended; one call at a time."""
        if self._reader is None:
            return b""  # this actor is the successor of the one that was asked
        try:
            data = await self._reader.read(READ_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            self._end()
        return data

    async def write(self, data: bytes) -> None:
        """Bytes for the worker, dropped once it has ended; one call at a time."""
        if self._writer is None:
            return
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            return  # `read` tells

    async def fetch(self, path: str) -> bytes:
        """A file of this node."""
        return await asyncio.to_thread(Path(path).read_bytes)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._reader = self._writer = None
