"""Two consumers of one event stream: the collected response and the server-sent chunks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.admission import Job
from server.errors import (
    ApiError,
    ClientGoneError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    error_response,
)
from server.messages import FailedEvent, FinishedEvent, StepEvent
from server.pool import WorkerPool
from server.report import Report, usage
from server.text import ChoiceText, Delta, Detokenizer, StopScanner

KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

log = structlog.get_logger("server.streaming")


class Generation:
    """One job on its way through the pool: an iterator of text deltas, then a complete `report`."""

    def __init__(self, pool: WorkerPool, job: Job, fingerprint: str) -> None:
        assert pool.codec is not None
        self.job = job
        self.report = Report(job)
        self._pool = pool
        self._created = int(time.time())
        self._fingerprint = fingerprint
        request = job.request
        include_stop = bool(request.include_stop_str_in_output)
        skip_special = request.skip_special_tokens is not False
        self._texts = {
            command.choice_offset + index: ChoiceText(
                Detokenizer(pool.codec, command.prompt_ids, skip_special_tokens=skip_special),
                StopScanner(request.stops, include=include_stop),
                request.stop_token_ids or [],
                include_stop=include_stop,
            )
            for command in job.commands
            for index in range(command.n)
        }

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Raises ApiError when the request fails; close it to give the rows back."""
        job = self.job
        events = self._pool.generate(job.commands, model=job.served_model, arrived=job.arrived)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, StepEvent):
                    delta = self._on_step(event)
                    if delta is not None:
                        yield delta
                elif isinstance(event, FinishedEvent):
                    self.report.stats.append(event.stats)
                else:
                    raise api_error(event)

    def _on_step(self, event: StepEvent) -> Delta | None:
        text = self._texts[event.choice]
        if text.finished:
            return None
        if event.token_ids:
            self.report.note_tokens(time.monotonic())
        delta = text.push(event)
        if delta.finish_reason is not None and self.job.request.stops:
            self._pool.finish(event.id, event.choice, delta.num_tokens)
        return delta

    def usage_so_far(self) -> dict[str, int]:
        return usage(self.report.prompt_tokens, sum(text.num_tokens for text in self._texts.values()))

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What the response and every chunk have in common."""
        return {
            "id": self.job.id,
            "object": "text_completion",
            "created": self._created,
            "model": self.job.request.model,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
        }


def api_error(event: FailedEvent) -> ApiError:
    if event.code == "draining":
        return OverloadedError("draining")
    if event.code == "invalid_value":
        return InvalidRequestError(
            "The request cannot be decoded: check 'prompt' and 'max_tokens'.", code=event.code
        )
    return ServerError(event.code)


def choice_body(index: int, text: str, reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": stop_reason,
    }


async def collect(generation: Generation) -> dict[str, Any]:
    """The whole response; raises ApiError."""
    texts: dict[int, list[str]] = {}
    ends: dict[int, Delta] = {}
    async with contextlib.aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            texts.setdefault(delta.choice, []).append(delta.text)
            if delta.finish_reason is not None:
                ends[delta.choice] = delta
    choices = [
        choice_body(index, "".join(texts[index]), ends[index].finish_reason, ends[index].stop_reason)
        for index in sorted(ends)
    ]
    report = generation.report
    return generation.body(choices) | {"usage": report.usage(), "metrics": report.metrics()}


async def chunks(generation: Generation) -> AsyncGenerator[bytes, None]:
    """The same response as server-sent events, without the final `[DONE]`; raises ApiError."""
    request = generation.job.request
    async with contextlib.aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if not delta.text and delta.finish_reason is None:
                continue  # tokens, but no whole character yet
            choice = choice_body(delta.choice, delta.text, delta.finish_reason, delta.stop_reason)
            chunk = generation.body([choice])
            if request.include_usage:
                chunk["usage"] = generation.usage_so_far() if request.continuous_usage else None
            yield sse(chunk)
    if request.include_usage:
        report = generation.report
        yield sse(generation.body([]) | {"usage": report.usage(), "metrics": report.metrics()})


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


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStreamResponse(Response):
    """Sends a generation's chunks, a comment line in every silence, and stops when the client leaves.

    Nothing is sent before the first chunk or comment is due, so that an early failure still has its
    own status.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(client_gone(receive))
        source = chunks(self._generation)
        following = asyncio.ensure_future(anext(source, None))
        try:
            while True:
                done, _ = await asyncio.wait(
                    {following, gone}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    return
                chunk = following.result() if done else KEEP_ALIVE
                if chunk is None:
                    break
                await self._send(send, chunk)
                if done:
                    following = asyncio.ensure_future(anext(source, None))
            await self._send(send, DONE, more=False)
        except ApiError as error:
            await self._fail(scope, receive, send, error)
        except Exception:
            log.exception("stream_failed")
            await self._fail(scope, receive, send, ServerError())
        finally:
            await _cancel(following, gone)
            await source.aclose()

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _fail(self, scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
        """Before the first byte an answer of its own, after it an event and `[DONE]`."""
        request_id = scope.get("state", {}).get("request_id")
        if not self._started:
            await error_response(error, request_id)(scope, receive, send)
            return
        await self._send(send, sse(error.body(request_id)))
        await self._send(send, DONE, more=False)
