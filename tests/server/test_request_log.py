"""The line of each request: what it holds, and what it never does."""

import asyncio
import io
import json
from typing import Any

import pytest

from tests.server.conftest import Serve, Served
from tests.server.fakes import ScriptedEngine, until

SECRET = "sécret\r\n\x1b[31m\u2028words"
KEY = "the-secret-key"


def lines_of(logs: io.StringIO) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in logs.getvalue().splitlines()]
    return [line for line in lines if line["event"] == "request"]


async def test_a_completion(served: Served, logs: io.StringIO) -> None:
    response = await served.complete(prompt="abc", max_tokens=5, user="somebody")
    (line,) = lines_of(logs)
    assert line["request_id"] == response.headers["x-request-id"]
    assert (line["http_method"], line["route"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["model"], line["method"], line["stream"]) == ("tiny", "mmtad", False)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 5)
    metrics = response.json()["metrics"]
    for name in ("queue_time_ms", "time_to_first_token_ms", "generation_time_ms"):
        assert line[name] == metrics[name]
    assert line["duration_ms"] >= line["time_to_first_token_ms"]
    assert len(line["user"]) == 16
    assert "key" not in line


async def test_a_stream_is_logged_at_its_end(served: Served, logs: io.StringIO) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 7, "stream": True}
    async with served.client.stream("POST", "/v1/completions", json=body) as response:
        await response.aread()
    (line,) = lines_of(logs)
    assert (line["stream"], line["status"], line["completion_tokens"]) == (True, 200, 7)


async def test_tokens_of_a_client_that_left_are_not_guessed(serve_port: Serve, logs: io.StringIO) -> None:
    engine = ScriptedEngine()
    engine.gate.clear()
    async with serve_port(engine) as served:
        async with served.connect() as (_, writer):
            body = b'{"model": "tiny", "prompt": "x"}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: bool(served.worker.commands))
        await until(lambda: bool(lines_of(logs)))
    (line,) = lines_of(logs)
    assert (line["status"], line["prompt_tokens"]) == (499, 1)
    assert "completion_tokens" not in line


async def test_errors_have_their_code(served: Served, logs: io.StringIO) -> None:
    await served.complete(n=0)
    await served.client.get("/scanner/%0d%0apath")
    await served.client.request("X" * 5000, "/v1/models")
    first, second, third = lines_of(logs)
    assert (first["status"], first["error"]) == (400, "integer_below_min_value")
    assert (second["route"], second["error"]) == ("other", "http_404")
    assert (third["http_method"], third["status"]) == ("other", 405)
    assert "scanner" not in logs.getvalue()


async def test_probes_are_not_logged(served: Served, logs: io.StringIO) -> None:
    for path in ("/health", "/ready", "/metrics"):
        await served.client.get(path)
    assert lines_of(logs) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": SECRET},
        {"prompt": SECRET, "echo": True, "logprobs": 2},
        {"prompt": SECRET, "stream": True},
        {"prompt": [SECRET] * 3},
        {"prompt": SECRET * 100},
        {"prompt": "x", "stop": SECRET, "user": SECRET},
        {"prompt": SECRET, "n": "2"},
        {"prompt": {"text": SECRET}},
        {"prompt": "x", SECRET: 1},
        {"prompt": "x", "model": SECRET},
        {"prompt": "x", "logit_bias": {SECRET: 1}},
        {"prompt": "x", "speculative": {"method": SECRET}},
    ],
    ids=str,
)
async def test_neither_prompt_nor_key_is_logged(
    serve: Serve, logs: io.StringIO, fields: dict[str, Any]
) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    async with serve(api_key=[KEY]) as served:
        await served.client.post("/v1/completions", json={"model": "tiny", **fields}, headers=headers)
        await served.client.post("/v1/completions", json=fields, headers={"authorization": f"Bearer {KEY}x"})
        chat = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
        await served.client.post("/v1/chat/completions", json=chat, headers=headers)
        await served.client.post("/tokenize", json={"prompt": SECRET}, headers=headers)
        await served.client.get(f"/v1/models/{KEY}", headers=headers)
    text = logs.getvalue()
    known, unknown = (line.get("key") for line in lines_of(logs)[:2])
    assert known is not None
    assert len(known) == 8
    assert unknown is None
    assert text.isascii()
    assert all(character.isprintable() for character in text.replace("\n", ""))
    decoded = [value for line in lines_of(logs) for value in line.values() if isinstance(value, str)]
    for word in ("cret", "[31m", "words", KEY):
        assert word not in text
        assert not any(word in value for value in decoded)


async def test_what_a_failing_stream_told_is_logged(served: Served, logs: io.StringIO) -> None:
    served.engine.hold_after = 1
    body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": True}
    sending = served.client.post("/v1/completions", json=body)

    async def fail() -> None:
        await until(lambda: served.engine.num_steps == 1)
        served.engine.failures.append(RuntimeError("broken"))
        served.engine.gate.set()

    response, _ = await asyncio.gather(sending, fail())
    assert response.status_code == 200
    (line,) = lines_of(logs)
    assert line["status"] == 200
    assert line["error"] in response.text
    assert served.metric("mmtad_requests_rejected_total", reason=line["error"]) is None
