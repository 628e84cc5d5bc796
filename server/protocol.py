"""uvicorn's HTTP/1.1 with what it lacks: timers for headers and readers, errors in OpenAI's shape."""

import asyncio
import functools
import http
import secrets
import sys
from collections.abc import Callable
from typing import Any

import h11
import msgspec
import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError, InvalidRequestError
from server.limits import CLOSE, HttpLimits, headers_too_large

READ_BYTES = 8192
LINGER_SECONDS = 5
THROW_AWAY_SECONDS = 1.0
NOT_HTTP = "The request is not valid HTTP/1.1: check its headers."
TOO_SLOW = "The headers did not arrive within {seconds:g} s: send them faster."

OnRefusal = Callable[[ApiError, str], None]  # the error that was told, and the id that was given to it

log = structlog.get_logger("server.http")


class LingeringTransport:
    """A transport that knows how much was written to it, and closes without losing an answer.

    Closing over bytes that nobody read resets a connection, and the client may lose what it was told.
    Where some of a request is still to come (`is_owed`), only our side is closed at once; what comes is
    thrown away until the client closes its own, at most for `THROW_AWAY_SECONDS`.
    """

    def __init__(self, transport: asyncio.Transport, is_owed: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_owed = is_owed
        self._end: asyncio.TimerHandle | None = None
        self.num_written = 0

    def write(self, data: bytes) -> None:
        self.num_written += len(data)
        self._transport.write(data)

    def close(self) -> None:
        if self.is_closing():
            return
        if not (self._is_owed() and self._transport.can_write_eof()):
            self._transport.close()
            return
        self._end = asyncio.get_running_loop().call_later(THROW_AWAY_SECONDS, self._transport.abort)
        self._transport.write_eof()
        self._transport.resume_reading()

    def is_closing(self) -> bool:
        return self.throws_away or self._transport.is_closing()

    @property
    def throws_away(self) -> bool:
        return self._end is not None

    def lost(self) -> None:
        if self._end is not None:
            self._end.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class TimedProtocol(H11Protocol, asyncio.BufferedProtocol):
    """A connection that cannot be held open for ever, nor hold up the others.

    It is closed when its next request is not there, headers complete, in `header_seconds`, and when
    nothing of an answer is taken in `reader_seconds`. One that is kept alive and silent is closed
    sooner, by uvicorn itself. What arrives is taken in small pieces, because the cost of parsing it
    is that of its chunks, and a chunk may be one byte.
    """

    transport: Any

    def __init__(self, *args: Any, limits: HttpLimits, on_refusal: OnRefusal, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._on_refusal = on_refusal
        self._buffer = bytearray(READ_BYTES)
        self._header_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = LingeringTransport(transport, self._is_owed)
        self._watch_headers()
        self._watch_reader(num_taken=0, since=self.loop.time())

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self.transport.throws_away:
            self.data_received(bytes(self._buffer[:nbytes]))

    def _is_owed(self) -> bool:
        """Whether the client may still be sending what nobody will read."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching_headers()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        self.transport.lost()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles what h11 raised."""
        raised = sys.exc_info()[1]
        if getattr(raised, "error_status_hint", 400) == 431:
            self._refuse(headers_too_large(self._limits))
        else:
            self._refuse(InvalidRequestError(NOT_HTTP, code=None, headers=CLOSE))

    def _refuse(self, error: ApiError) -> None:
        """Answer bytes that are no request, and close; after the start of another answer only close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = secrets.token_hex(16)
            self._on_refusal(error, request_id)
            body = msgspec.json.encode(error.body())
            headers = {**error.headers, "content-type": "application/json", "x-request-id": request_id}
            headers["content-length"] = str(len(body))
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            phrase = http.HTTPStatus(error.status).phrase.encode()
            events: tuple[h11.Event, ...] = (
                h11.Response(status_code=error.status, headers=raw, reason=phrase),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching_headers()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_seconds, self._give_up)

    def _stop_watching_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        """Half a request is told that it was too slow; of silence there is nothing to tell."""
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            message = TOO_SLOW.format(seconds=self._limits.header_seconds)
            self._refuse(InvalidRequestError(message, code="request_timeout", status=408, headers=CLOSE))
        else:
            self.transport.close()

    def _watch_reader(self, num_taken: int, since: float) -> None:
        """At the last look the client had taken `num_taken` bytes, the last of them at `since`."""
        num_waiting = self.transport.get_write_buffer_size()
        taken, now = self.transport.num_written - num_waiting, self.loop.time()
        if taken > num_taken or not num_waiting:
            since = now
        elif now - since >= self._limits.reader_seconds:
            log.warning("reader_too_slow", seconds=self._limits.reader_seconds, num_bytes=num_waiting)
            self.transport.abort()
            return
        pause = self._limits.reader_seconds / 15
        self._reader_timer = self.loop.call_later(pause, self._watch_reader, taken, since)


def http_config(app: ASGIApp, limits: HttpLimits, on_refusal: OnRefusal, **settings: Any) -> uvicorn.Config:
    """uvicorn as this server runs it; `settings` are uvicorn's own."""
    protocol: Any = functools.partial(TimedProtocol, limits=limits, on_refusal=on_refusal)
    return uvicorn.Config(
        app,
        http=protocol,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_graceful_shutdown=LINGER_SECONDS,
        access_log=False,
        log_config=None,
        server_header=False,
        ws="none",
        **settings,
    )
