"""One streamed completion of any OpenAI-compatible server, timed from outside."""

import contextlib
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; times in seconds of one monotonic clock.

    `due` is when it should have been sent, and what its latencies count from: a load generator that falls
    behind must not make the server look faster. Tokens are those of the server's `usage`; `error` names
    the kind of a failure, and `metrics` is this server's own report where there is one.
    """

    due: float
    ended: float
    first: float | None = None
    tokens: int = 0
    error: str | None = None
    metrics: dict[str, Any] | None = None

    @property
    def to_first_token(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def per_output_token(self) -> float | None:
        """Seconds per token after the first: a step may bring several, so no gap between events."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.ended - self.first) / (self.tokens - 1)

    @property
    def seconds(self) -> float:
        return self.ended - self.due


def shaped(method: str) -> dict[str, Any]:
    """`mmtad-4x4`: depth and width fixed; without them a server may choose them anew in every step.

    Raises:
        ValueError: what follows the method is not a depth and a width.
    """
    name, _, shape = method.partition("-")
    if not shape:
        return {"method": name}
    depth, width = (int(number) for number in shape.split("x"))
    return {"method": name, "num_speculative_tokens": depth, "beam_width": width}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and what all of them have in common."""

    http: httpx.AsyncClient
    fields: dict[str, Any]

    async def ask(self, prompt: str, method: str | None, due: float) -> Outcome:
        """Never raises for what a server or a network can do: that is an outcome."""
        body = {**self.fields, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        if method is not None:
            body["speculative"] = {**shaped(method), **(self.fields.get("speculative") or {})}
        try:
            async with self.http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    return _failed(due, await _refusal(response))
                return await _read(response, due)
        except httpx.TimeoutException:
            return _failed(due, "timeout")
        except httpx.TransportError as error:
            return _failed(due, type(error).__name__)
        except (ValueError, KeyError, TypeError):
            return _failed(due, "unreadable answer")


async def _read(response: httpx.Response, due: float) -> Outcome:
    first: float | None = None
    usage: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    async with contextlib.aclosing(_events(response)) as events:
        async for event in events:
            if event is None:
                if usage is None:
                    return _failed(due, "no usage in the stream")
                return Outcome(due, time.monotonic(), first, usage["completion_tokens"], None, metrics)
            if "error" in event:
                return _failed(due, _kind(event["error"]))
            if first is None and any(choice.get("text") for choice in event.get("choices", ())):
                first = time.monotonic()
            usage = event.get("usage") or usage
            metrics = event.get("metrics") or metrics
    return _failed(due, "stream ended early")


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any] | None]:
    """The server-sent objects, None for the end that the protocol asks for."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            yield None
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def _refusal(response: httpx.Response) -> str:
    await response.aread()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return f"{response.status_code} {_kind(response.json()['error'])}"
    return str(response.status_code)


def _kind(error: Any) -> str:
    """Other servers put anything there."""
    known = error if isinstance(error, dict) else {}
    return str(known.get("code") or known.get("type") or "error")


def _failed(due: float, kind: str) -> Outcome:
    return Outcome(due, time.monotonic(), error=kind)
