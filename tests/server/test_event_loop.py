"""Whatever one client sends, the others wait at most a moment: the longest silence of the event loop."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.server.conftest import Serve
from tests.server.fakes import ScriptedEngine, constant, until

GOAL_SECONDS = 0.1
CEILING_SECONDS = 10 * GOAL_SECONDS  # on a machine that is busy with other things
TICK_SECONDS = 0.002
MIB = 2**20
CONTEXT = 4096


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """As the server does once it is ready; here the heap holds all tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@asynccontextmanager
async def watched(name: str) -> AsyncIterator[None]:
    """Fails when the loop was silent for longer than the ceiling, and this process was at work then."""
    silences = [0.0]

    async def tick() -> None:
        while True:
            last, last_work = time.perf_counter(), time.process_time()
            await asyncio.sleep(TICK_SECONDS)
            gap, work = time.perf_counter() - last, time.process_time() - last_work
            silences.append(min(gap, work))

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0)
    try:
        yield
        seen = len(silences)
        await until(lambda: len(silences) > seen)
    finally:
        ticking.cancel()
    print(f"{name}: the loop was silent for {1000 * max(silences):.1f} ms at most")  # noqa: T201
    assert max(silences) < CEILING_SECONDS


def members(count: int) -> str:
    return ",".join(f'"f{number}":1' for number in range(count))


def many(unit: str) -> str:
    """A list of them, as long as a body may be."""
    return "[" + ",".join([unit] * ((MIB - 200) // (len(unit) + 1))) + "]"


CHAT = '{"model":"tiny","messages":[{"role":"user","content":'

COMPLETIONS = {
    "unknown fields": '{"model":"tiny",' + members(90_000) + "}",
    "unknown fields, as many as are looked at": '{"model":"tiny",' + members(65_000) + "}",
    "unknown fields of speculative": '{"model":"tiny","speculative":{' + members(65_000) + "}}",
    "one long unknown field": '{"model":"tiny","' + "x" * (MIB - 50) + '":1}',
    "a bias of every name": '{"model":"tiny","logit_bias":{' + members(65_000) + "}}",
    "bad elements": '{"model":"tiny","prompt":[[1],' + ",".join(['"x"'] * 20_000) + "]}",
    "bad token ids": '{"model":"tiny","prompt":[1,' + many('"x"')[1:] + "}",
    "lists of token ids": '{"model":"tiny","prompt":' + many("[1]") + "}",
    "lists, as many as are looked at": '{"model":"tiny","prompt":[' + ",".join(["[1]"] * 8000) + "]}",
    "lists as the model": '{"model":' + many("[]") + "}",
    "quotes": '{"model":"tiny","x":' + many('"[:"') + "}",
    "token ids": '{"model":"tiny","prompt":' + many("1") + "}",
    "texts": '{"model":"tiny","prompt":' + many('""') + "}",
    "texts, as many as are looked at": '{"model":"tiny","prompt":[' + ",".join(['"[:"'] * 130_000) + "]}",
    "stop strings": '{"model":"tiny","stop":' + many('"a"') + "}",
    "stop ids": '{"model":"tiny","stop_token_ids":' + many("1") + "}",
    "deep": "[" * (MIB - 1),
    "deep objects": '{"a":' * (MIB // 5 - 1),
    "brackets in a prompt": '{"model":"tiny","prompt":"' + "[{:" * (MIB // 3 - 20) + '"}',
    "a long prompt": '{"model":"tiny","prompt":"' + "x y" * (MIB // 3 - 20) + '"}',
    "escapes": '{"model":"tiny","prompt":"' + "\\u00e9" * (MIB // 6 - 20) + '"}',
    "a long number": '{"model":"tiny","seed":' + "9" * (MIB - 50) + "}",
    "long numbers": '{"model":"tiny","seed":' + many("9" * 4300) + "}",
}
CHATS = {
    "unknown fields of a message": CHAT + '"x",' + members(65_000) + "}]}",
    "unknown fields of a part": CHAT + '[{"type":"text",' + members(65_000) + "}]}]}",
    "parts": CHAT + "[" + ",".join(['{"type":"text","text":""}'] * 8000) + "]}]}",
    "messages": '{"model":"tiny","messages":[' + ",".join(['{"role":"user","content":"x"}'] * 2048) + "]}",
    "tools": CHAT + '"x"}],"tools":[' + ",".join(["{}"] * 8000) + "]}",
}


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [("/v1/completions", *case) for case in COMPLETIONS.items()]
    + [("/v1/chat/completions", *case) for case in CHATS.items()],
    ids=[*COMPLETIONS, *CHATS],
)
async def test_refusals(serve: Serve, path: str, name: str, body: str) -> None:
    content = body.encode()
    assert len(content) <= MIB
    headers = {"content-type": "application/json"}
    async with serve(ScriptedEngine(context=CONTEXT)) as served:
        async with watched(name):
            response = await served.client.post(path, content=content, headers=headers)
        assert response.status_code == 400
        assert len(response.content) <= 2048


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x y" * 330_000, "return_token_strs": True}),
        ("/tokenize", {"prompt": "é" * 500_000}),
        ("/detokenize", {"tokens": [1] * 340_000}),
    ],
    ids=["strings", "ids", "text"],
)
async def test_long_texts(serve: Serve, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body, ensure_ascii=False).encode()
    assert len(content) <= MIB
    async with serve() as served:
        async with watched(path):
            response = await served.client.post(
                path, content=content, headers={"content-type": "application/json"}
            )
        assert response.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["x" * 4000] * 64, "n": 2},
        {"prompt": [[1] * 4000] * 64, "n": 2},
        {"prompt": ["x" * 2000] * 16, "echo": True, "logprobs": 5},
        {"prompt": "x" * 4000, "echo": True, "logprobs": 5},
        {"prompt": "x", "n": 128, "logprobs": 5, "max_tokens": 100, "ignore_eos": True},
        {"prompt": "x", "logit_bias": {str(token): -1.5 for token in range(258)}},
    ],
    ids=["texts", "ids", "echo", "long echo", "choices", "bias"],
)
async def test_large_requests(serve: Serve, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 1, **fields}
    content = json.dumps(body).encode()
    engine = ScriptedEngine(constant("x" * 100), context=CONTEXT, max_num_seqs=128, tokens_per_step=10)
    async with serve(engine, max_num_seqs=128) as served:
        async with watched("a large request"):
            response = await served.client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
        assert response.status_code == 200


async def test_chunks_of_one_byte(serve_port: Serve) -> None:
    """Parsing costs per chunk: what has arrived is taken in pieces."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"model": "tiny"' + b" " * 60_000 + b"}")
    async with serve_port() as served, served.connect() as (reader, writer), watched("chunks"):
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 30)).startswith(b"HTTP/1.1 200")
