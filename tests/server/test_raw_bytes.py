"""Requests with broken bytes: an answer in OpenAI's shape, or a closed connection, and never a 5xx."""

import asyncio
import json
import random

import h11

from server.limits import HttpLimits
from tests.server.conftest import Serve, Served

NUM_MUTATIONS = 2000
AT_ONCE = 50
BODY = json.dumps(
    {
        "model": "tiny",
        "prompt": ["é\U0001f600", "x"],
        "max_tokens": 2,
        "logit_bias": {"7": -1.5},
        "stop": ["q"],
    }
).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
LIMITS = HttpLimits(header_seconds=0.05, body_seconds=0.05)


def mutated(source: random.Random) -> bytes:
    """A request with up to four bytes changed, cut, doubled or put in."""
    data = bytearray(source.choice((WHOLE, CHUNKED)))
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data))
        match source.randrange(4):
            case 0:
                data[at] = source.randrange(256)
            case 1:
                del data[at : at + source.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + source.randint(1, 8)]
            case 3:
                data[at:at] = source.randbytes(source.randint(1, 4))
    return bytes(data)


async def answer(served: Served, sent: bytes) -> tuple[int, bytes] | None:
    """Status and body, None where the connection was closed without an answer."""
    async with served.connect() as (reader, writer):
        writer.write(sent)
        received = await asyncio.wait_for(reader.read(), 10)
    if not received:
        return None
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    client.receive_data(received)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return response.status_code, body


async def test_mutations(serve_port: Serve) -> None:
    source = random.Random(7)
    statuses: set[int] = set()
    async with serve_port(limits=LIMITS) as served:
        for _ in range(NUM_MUTATIONS // AT_ONCE):
            sent = [mutated(source) for _ in range(AT_ONCE)]
            answers = await asyncio.gather(*(answer(served, each) for each in sent))
            for each, answered in zip(sent, answers, strict=True):
                if answered is None:
                    continue
                status, body = answered
                statuses.add(status)
                assert status < 500, each
                if status != 200:
                    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
                    assert len(body) <= 2048
        assert (await served.complete()).status_code == 200
        assert served.pool._reserved.num_slots == 0
    assert statuses >= {200, 400, 404, 408, 415}
