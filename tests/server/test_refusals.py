"""Every refusal is counted once, under its code, whoever refuses."""

import asyncio
import json
from typing import Any

import pytest

from server.limits import HttpLimits
from tests.server.conftest import Serve, Served
from tests.server.fakes import ScriptedEngine, until

LIMITS = HttpLimits(body_bytes=500, body_seconds=0.1, header_seconds=0.1, header_bytes=4096)
KEY = b"Authorization: Bearer k\r\n"
JSON = KEY + b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def whole(fields: dict[str, Any]) -> bytes:
    body = json.dumps({"model": "tiny", **fields}).encode()
    return POST + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body


def get(path: bytes, method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n"


def refusals(served: Served) -> dict[str, float]:
    """Count by reason, of all that were counted."""
    families = served.pool.metrics.registry.collect()
    (samples,) = (family.samples for family in families if family.name == "mmtad_requests_rejected")
    return {sample.labels["reason"]: sample.value for sample in samples}


REFUSED = {
    "not JSON": (POST + JSON + b"Content-Length: 1\r\n\r\n{", b"400", "http_400"),
    "a field": (whole({"n": 0}), b"400", "integer_below_min_value"),
    "too long": (whole({"max_tokens": 999}), b"400", "context_length_exceeded"),
    "too long a stream": (whole({"max_tokens": 999, "stream": True}), b"400", "context_length_exceeded"),
    "not HTTP": (b"x\r\n\r\n", b"400", "http_400"),
    "no key": (POST + b"Content-Length: 99\r\n\r\n", b"401", "http_401"),
    "a wrong key": (POST + KEY.replace(b"k", b"x") + b"\r\n", b"401", "invalid_api_key"),
    "a model": (whole({"model": "x"}), b"404", "model_not_found"),
    "no such model": (get(b"/v1/models/x"), b"404", "model_not_found"),
    "a path": (get(b"/x"), b"404", "http_404"),
    "a method": (get(b"/v1/completions", b"PUT"), b"405", "http_405"),
    "slow headers": (POST, b"408", "request_timeout"),
    "a slow body": (POST + JSON + b"Content-Length: 9\r\n\r\n{", b"408", "request_timeout"),
    "a long body": (POST + JSON + b"Content-Length: 501\r\n\r\n", b"413", "content_too_large"),
    "a body that grows": (
        POST + JSON + b"Transfer-Encoding: chunked\r\n\r\n1f5\r\n" + b" " * 501,
        b"413",
        "content_too_large",
    ),
    "a form": (POST + KEY + b"Content-Length: 0\r\n\r\n", b"415", "unsupported_media_type"),
    "many headers": (POST + JSON + b"A: b\r\n" * 100 + b"\r\n", b"431", "http_431"),
    "large headers": (POST + JSON + b"A: " + b"b" * 4096 + b"\r\n\r\n", b"431", "http_431"),
}


@pytest.mark.parametrize(("sent", "status", "reason"), REFUSED.values(), ids=REFUSED.keys())
async def test_once(serve_port: Serve, sent: bytes, status: bytes, reason: str) -> None:
    async with serve_port(limits=LIMITS, api_key=["k"]) as served:
        async with served.connect() as (reader, writer):
            writer.write(sent)
            line = await asyncio.wait_for(reader.readline(), 10)
        assert line.startswith(b"HTTP/1.1 " + status)
        await until(lambda: bool(refusals(served)))
        assert refusals(served) == {reason: 1}
        assert served.pool._reserved.num_slots == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue(serve: Serve, stream: bool) -> None:
    """Of slots, before the body, and of rows, after it."""
    engine = ScriptedEngine()
    engine.gate.clear()
    async with serve(engine, max_num_seqs=1, max_num_queued_reqs=1) as served:
        first = asyncio.ensure_future(served.complete())
        await until(lambda: bool(served.worker.commands))
        rows = await served.complete(n=2, stream=stream)
        second = asyncio.ensure_future(served.complete())
        await until(lambda: served.pool._reserved.num_slots == 2)
        slots = await served.complete(stream=stream)
        assert (rows.status_code, slots.status_code) == (503, 503)
        engine.gate.set()
        assert [(await each).status_code for each in (first, second)] == [200, 200]
        assert refusals(served) == {"queue_full": 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_queue_full_of_tokens(serve: Serve, stream: bool) -> None:
    """Prompt and `max_tokens` of every choice count, from validation to the end, however it comes."""
    engine = ScriptedEngine()
    engine.gate.clear()
    room = {"max_num_seqs": 1, "max_num_queued_reqs": 8, "max_num_queued_tokens": 16}
    async with serve(engine, **room) as served:
        reserved = served.pool._reserved
        first = asyncio.ensure_future(served.complete(prompt=[1] * 10, max_tokens=50))
        await until(lambda: reserved.num_tokens == 60)
        second = asyncio.ensure_future(served.complete(prompt=[1] * 5, max_tokens=5, n=2))
        await until(lambda: reserved.num_tokens == 80)
        refused = await served.complete(prompt=[1], max_tokens=0, stream=stream)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert served.metric("mmtad_reserved_tokens", model="tiny") == 80
        engine.gate.set()
        assert [(await each).status_code for each in (first, second)] == [200, 200]
        assert (reserved.num_tokens, reserved.num_sequences) == (0, 0)
        assert refusals(served) == {"queue_full": 1}


async def test_more_tokens_than_there_is_room_for_are_served_alone(serve: Serve) -> None:
    async with serve(max_num_seqs=1, max_num_queued_tokens=0) as served:
        assert (await served.complete(n=4, max_tokens=40)).status_code == 200
        assert served.pool._reserved.num_tokens == 0


async def test_what_is_no_refusal_is_not_counted(serve: Serve) -> None:
    """Probes, failures while serving, and clients that are served."""
    async with serve(ready=False) as served:
        assert (await served.client.get("/ready")).status_code == 503
        assert refusals(served) == {}
    async with serve() as served:
        served.engine.failures.append(RuntimeError("broken"))
        assert (await served.complete()).status_code == 500
        assert (await served.complete()).status_code == 200
        assert refusals(served) == {}
