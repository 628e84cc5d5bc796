"""What is made of a stream: tokens from usage, times from text, a kind for every failure."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from benchmarks.load.client import Endpoint, Outcome, shaped

Handler = Callable[[httpx.Request], httpx.Response]
USAGE = {"choices": [], "usage": {"completion_tokens": 10}, "metrics": {"seed": 1}}


def text(value: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value}]}


def stream(*events: dict[str, Any], end: bool = True) -> httpx.Response:
    lines = [": a comment\n\n", *(f"data: {json.dumps(event)}\n\n" for event in events)]
    return httpx.Response(200, text="".join(lines) + ("data: [DONE]\n\n" if end else ""))


async def ask(handler: Handler, method: str | None = None, **fields: Any) -> Outcome:
    transport = httpx.MockTransport(handler)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        return await Endpoint(http, {"model": "m", **fields}).ask("p", method, time.monotonic())


async def test_tokens_are_counted_by_usage_never_by_chunks() -> None:
    outcome = await ask(lambda _: stream(text("five words in one chunk"), text("and five more"), USAGE))
    assert outcome.error is None
    assert outcome.tokens == 10
    assert outcome.metrics == {"seed": 1}
    assert outcome.to_first_token is not None
    assert 0 < outcome.to_first_token <= outcome.seconds


async def test_the_first_token_is_the_first_text() -> None:
    assert (await ask(lambda _: stream({"choices": []}, text(""), USAGE))).first is None


def test_time_per_token_leaves_the_first_out() -> None:
    assert Outcome(due=1, first=3, ended=7, tokens=5).per_output_token == 1
    assert Outcome(due=1, first=3, ended=7, tokens=1).per_output_token is None


async def test_the_method_is_sent_with_what_else_was_asked() -> None:
    sent: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return stream(text("x"), USAGE)

    await ask(handler, "mmtad", speculative={"beam_width": 2})
    await ask(handler)
    assert sent[0]["speculative"] == {"method": "mmtad", "beam_width": 2}
    assert shaped("speculative-2x1") == {
        "method": "speculative",
        "num_speculative_tokens": 2,
        "beam_width": 1,
    }
    assert "speculative" not in sent[1]
    assert all(body["stream_options"] == {"include_usage": True} for body in sent)


def raises(error: Exception) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    return handler


FULL = {"error": {"message": "", "type": "overloaded_error", "param": None, "code": "queue_full"}}
BROKEN = {"error": {"message": "", "type": "server_error", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (lambda _: httpx.Response(503, json=FULL), "503 queue_full"),
        (lambda _: httpx.Response(502, text="<html>"), "502"),
        (lambda _: httpx.Response(500, json={"error": "x"}), "500 error"),
        (lambda _: httpx.Response(200, text="data: 5\n\n"), "unreadable answer"),
        (lambda _: stream(text("x"), BROKEN), "server_error"),
        (lambda _: stream(text("x"), USAGE, end=False), "stream ended early"),
        (lambda _: stream(text("x")), "no usage in the stream"),
        (lambda _: httpx.Response(200, text="data: {broken\n\n"), "unreadable answer"),
        (lambda _: stream(text("x"), {"usage": {"tokens": 1}}), "unreadable answer"),
        (raises(httpx.ConnectError("x")), "ConnectError"),
        (raises(httpx.ReadTimeout("x")), "timeout"),
    ],
)
async def test_every_failure_has_its_kind(handler: Handler, kind: str) -> None:
    outcome = await ask(handler)
    assert outcome.error == kind
    assert outcome.tokens == 0
