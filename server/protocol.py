"""uvicorn's HTTP/1.1 with what it lacks: a limit on the time of headers, and errors in OpenAI's shape."""

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import InvalidRequestError

HEADER_SECONDS = 15.0
NOT_HTTP = "The request is not valid HTTP/1.1: check its headers and their size."


class TimedProtocol(H11Protocol):
    """Closes a connection whose next request is not there, headers complete, in `HEADER_SECONDS`.

    A connection that is kept alive and silent is closed sooner, by uvicorn itself.
    """

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = msgspec.json.encode(InvalidRequestError(NOT_HTTP, code=None).body())
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_watching(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
