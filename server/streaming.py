"""Two consumers of one event stream: the collected response and the server-sent chunks."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.choice_text import Delta
from server.errors import ApiError, ClientGoneError, ServerError, error_response, note_error
from server.generation import Generation

KEEP_ALIVE_SECONDS = 15.0
READER_SECONDS = 30.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

log = structlog.get_logger("server.streaming")


async def collect(generation: Generation) -> dict[str, Any]:
    """The whole response; raises ApiError."""
    gathered: dict[int, list[Delta]] = {}
    async with contextlib.aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            gathered.setdefault(delta.choice, []).append(delta)
    choices = []
    for index, candidate in enumerate(generation.ranked()):
        parts = gathered[candidate]
        if generation.job.request.num_top_log_probs is None:
            choices.append(_choice(generation, index, parts))
        else:  # a scored prompt has thousands of them
            choices.append(await asyncio.to_thread(_choice, generation, index, parts))
    report = generation.report
    body = generation.body(generation.shape.whole_object, choices)
    return body | {"usage": report.usage(), "metrics": report.metrics()}


def _choice(generation: Generation, index: int, deltas: list[Delta]) -> msgspec.Raw:
    """One choice as JSON."""
    whole = merged(deltas)
    return msgspec.Raw(
        msgspec.json.encode(generation.shape.whole(generation.codec, index, whole.text, whole))
    )


def merged(deltas: list[Delta]) -> Delta:
    """A choice as if one event had brought all of it."""
    entries = None
    if deltas[-1].entries is not None:
        entries = [entry for delta in deltas for entry in delta.entries or ()]
    return dataclasses.replace(deltas[-1], text="".join(delta.text for delta in deltas), entries=entries)


async def chunks(generation: Generation) -> AsyncGenerator[bytes, None]:
    """The same response as server-sent events, without the final `[DONE]`; raises ApiError."""
    request, shape = generation.job.request, generation.shape
    begun: set[int] = set()
    async with contextlib.aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if not delta.text and delta.finish_reason is None:
                continue  # tokens, but no whole character yet
            choice = shape.chunk(generation.codec, delta, first=delta.choice not in begun)
            begun.add(delta.choice)
            chunk = generation.body(shape.chunk_object, [choice])
            if request.include_usage:
                chunk["usage"] = generation.usage_so_far() if request.continuous_usage else None
            yield sse(chunk)
    if request.include_usage:
        report = generation.report
        end = generation.body(shape.chunk_object, [])
        yield sse(end | {"usage": report.usage(), "metrics": report.metrics()})


def sse(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def client_gone(receive: Receive) -> None:
    """Returns when the client has left; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect_while_connected(request: Request, generation: Generation) -> dict[str, Any]:
    """`collect`, given up when the client leaves; raises ClientGoneError then."""
    work = asyncio.ensure_future(collect(generation))
    gone = asyncio.ensure_future(client_gone(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError
        return work.result()
    finally:
        await _cancel(work, gone)


async def _any_done(tasks: "Iterable[asyncio.Future[None]]", timeout: float) -> bool:  # noqa: ASYNC109
    done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStreamResponse(Response):
    """Sends a generation's chunks, a comment line in every silence, and stops when the client leaves.

    A client that takes nothing for `READER_SECONDS` is as one that left.

    Nothing is sent before the first chunk or comment is due, so that an early failure still has its
    own status.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._started = False
        self._turn = asyncio.Lock()
        self._sending = False
        self._moved = 0.0  # monotonic seconds: when sending began or ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One task writes and this one watches it: a timer for every chunk would cost more than the chunk."""
        self._moved = time.monotonic()
        watched = {
            asyncio.ensure_future(self._write(scope, receive, send)),
            asyncio.ensure_future(client_gone(receive)),
        }
        try:
            while not await _any_done(watched, min(self._seconds_left(), READER_SECONDS, KEEP_ALIVE_SECONDS)):
                if self._seconds_left() > 0:
                    continue
                if self._sending:
                    raise TimeoutError
                async with asyncio.timeout(READER_SECONDS):
                    await self._send(send, KEEP_ALIVE)
        except TimeoutError:
            log.warning("reader_too_slow", seconds=READER_SECONDS)
        finally:
            await _cancel(*watched)

    def _seconds_left(self) -> float:
        """Until the client has taken nothing for too long, or has been sent nothing for too long."""
        bound = READER_SECONDS if self._sending else KEEP_ALIVE_SECONDS
        return max(self._moved + bound - time.monotonic(), 0.0)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(chunks(self._generation)) as source:
                async for chunk in source:
                    await self._send(send, chunk)
            await self._send(send, DONE, more=False)
        except ApiError as error:
            await self._fail(scope, receive, send, error)
        except Exception:
            log.exception("stream_failed")
            await self._fail(scope, receive, send, ServerError())

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with self._turn:
            self._sending, self._moved = True, time.monotonic()
            if not self._started:
                self._started = True
                start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self._sending, self._moved = False, time.monotonic()

    async def _fail(self, scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
        """Before the first byte an answer of its own, after it an event and `[DONE]`."""
        request_id = scope.get("state", {}).get("request_id")
        note_error(scope, error)
        if not self._started:
            await error_response(error, request_id)(scope, receive, send)
            return
        await self._send(send, sse(error.body(request_id)))
        await self._send(send, DONE, more=False)


async def respond(request: Request, generation: Generation) -> Response:
    """A stream or one JSON body, as the request asks; raises ApiError and ClientGoneError."""
    request.state.report = generation.report
    if generation.job.request.stream:
        return EventStreamResponse(generation)
    body = await collect_while_connected(request, generation)
    return Response(msgspec.json.encode(body), media_type="application/json")
