"""A proxy in front of a server whose clients become slow: they send, or take, next to nothing."""

import asyncio
import contextlib
import socket
from typing import Self

BYTE_PAUSE_SECONDS = 1.0  # between two bytes of a client that drips
RECEIVE_BUFFER_BYTES = 4096
NUM_WAITING = 1024  # connections that may arrive at once


class SlowProxy:
    """Relays connections to a port on loopback: with `drips` it passes on one byte of a request after
    another, with `stalls` it passes on whole requests and reads nothing of their answers.
    """

    def __init__(self, port: int, *, drips: bool = False, stalls: bool = False) -> None:
        self._port = port
        self._drips = drips
        self._stalls = stalls
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=NUM_WAITING)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.ensure_future(self._relay(reader, writer))
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, ("127.0.0.1", self._port))
        answers, requests = await asyncio.open_connection(sock=link)
        if self._stalls:
            requests.transport.pause_reading()  # type: ignore[attr-defined]
        directions = [
            asyncio.ensure_future(pump(reader, requests, drips=self._drips)),
            asyncio.ensure_future(pump(answers, writer)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            requests.transport.abort()
            writer.close()


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, drips: bool = False) -> None:
    """Until the end of the source, or an error of either."""
    with contextlib.suppress(ConnectionError):
        while content := await source.read(2**16):
            for piece in (content[at : at + 1] for at in range(len(content))) if drips else (content,):
                sink.write(piece)
                await sink.drain()
                if drips:
                    await asyncio.sleep(BYTE_PAUSE_SECONDS)
