"""A stream says what the whole response says, whatever was asked; no text ends in half a character.

Texts come from a model of random bytes, nudged towards those of emoji, Hebrew and NUL, so that whole
characters, broken ones and parts of them fall on every side of every step.
"""

import asyncio
import math
import random
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import RunningServer
from tests.e2e.events import events_of
from tests.e2e.random_requests import draw

pytestmark = pytest.mark.slow

NUM_REQUESTS = 200
AT_ONCE = 32
LOG_PROB_TOLERANCE = 2e-3  # nats; neighbours in a batch change the order of sums
SPECIAL = {"<s>", "</s>", "<pad>"}


@dataclass
class Choice:
    """One choice, put together from a stream or taken from a whole response."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_deltas: int = 0
    log_probs: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, part: dict[str, Any]) -> None:
        assert self.finish_reason is None, "something came behind the end"
        self.text += part["text"]
        self.finish_reason, self.stop_reason = part["finish_reason"], part["stop_reason"]
        self.num_deltas += 1
        for name, values in (part["logprobs"] or {}).items():
            self.log_probs.setdefault(name, []).extend(values or [])


@dataclass
class Answer:
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Any = None
    metrics: Any = None

    def add(self, body: dict[str, Any]) -> None:
        for part in body["choices"]:
            self.choices.setdefault(part["index"], Choice()).add(part)
        self.usage, self.metrics = body.get("usage"), body.get("metrics")
        if self.usage is not None:  # what was cached depends on who came before
            self.usage.pop("prompt_tokens_details", None)


async def whole(client: httpx.AsyncClient, request: dict[str, Any]) -> Answer:
    response = await client.post("/v1/completions", json=request)
    assert response.status_code == 200, (request, response.text)
    answer = Answer()
    answer.add(response.json())
    return answer


async def streamed(client: httpx.AsyncClient, request: dict[str, Any]) -> Answer:
    options = {"include_usage": True, "continuous_usage_stats": request["seed"] % 2 == 0}
    body = request | {"stream": True, "stream_options": options}
    answer = Answer()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        for event in events_of((await response.aread()).decode()):
            answer.add(event)
    return answer


def assert_same(one: Answer, other: Answer) -> None:
    assert one.choices.keys() == other.choices.keys()
    assert one.usage == other.usage
    for name in ("speculative", "seed"):
        assert one.metrics[name] == other.metrics[name]
    assert one.metrics["speculative_decoding"] == other.metrics["speculative_decoding"]
    for index, choice in one.choices.items():
        twin = other.choices[index]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (
            twin.text,
            twin.finish_reason,
            twin.stop_reason,
        )
        assert_same_log_probs(choice.log_probs, twin.log_probs)


def assert_same_log_probs(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> None:
    assert one.keys() == other.keys()
    if not one:
        return
    assert (one["tokens"], one["text_offset"]) == (other["tokens"], other["text_offset"])
    assert close(one["token_logprobs"], other["token_logprobs"])
    tops, twins = one["top_logprobs"], other["top_logprobs"]
    assert [sorted(top or {}) for top in tops] == [sorted(top or {}) for top in twins]
    for top, twin in zip(tops, twins, strict=True):
        assert close([*(top or {}).values()], [(twin or {})[token] for token in top or {}])


def close(values: list[Any], others: list[Any]) -> bool:
    pairs = zip(values, others, strict=True)
    return all(a == b or math.isclose(a, b, abs_tol=LOG_PROB_TOLERANCE, rel_tol=1e-4) for a, b in pairs)


def bytes_of(tokens: list[str], *, skip_special: bool) -> bytes:
    """What the tokens of a log-probability object stand for."""
    content = bytearray()
    for token in tokens:
        if token.startswith("bytes:"):
            content += bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        elif not (skip_special and token in SPECIAL):
            content += token.encode()
    return bytes(content)


def check_against_bytes(request: dict[str, Any], choice: Choice) -> bool:
    """Where the tokens are known and nothing was cut: the text is that of all bytes at once."""
    if "logprobs" not in request or {"echo", "stop", "stop_token_ids"} & request.keys():
        return False
    tokens = choice.log_probs.get("tokens", [])
    if choice.finish_reason == "stop" and "include_stop_str_in_output" not in request:
        tokens = tokens[:-1]
    content = bytes_of(tokens, skip_special=request.get("skip_special_tokens", True))
    assert choice.text == content.decode(errors="replace")
    return any(ord(character) > 0xFF and character != "\ufffd" for character in choice.text)


def with_stop_inside(rng: random.Random, request: dict[str, Any], answer: Answer) -> dict[str, Any] | None:
    """The same request, to be stopped by a piece of its own text, which several steps wrote."""
    text = answer.choices[0].text
    if "echo" in request or len(text) < 8:
        return None
    start = rng.randrange(2, len(text) - 4)
    return request | {"stop": [text[start : start + rng.randrange(2, 5)]]}


async def test_streams_equal_whole_responses(server: RunningServer) -> None:
    rng = random.Random(20)
    gate = asyncio.Semaphore(AT_ONCE)
    stopped, multi_byte, split = 0, 0, 0

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def compare(request: dict[str, Any]) -> Answer:
            nonlocal stopped, multi_byte, split
            async with gate:
                one, other = await asyncio.gather(whole(client, request), streamed(client, request))
            try:
                assert_same(one, other)
                for choice in other.choices.values():
                    stopped += isinstance(choice.stop_reason, str)
                    split += choice.num_deltas > 2
                    multi_byte += check_against_bytes(request, choice)
            except AssertionError as error:
                raise AssertionError(f"{request}\n{one}\n{other}") from error
            return other

        async def case(number: int) -> None:
            own = random.Random(number)
            request = draw(own, number)
            cut = with_stop_inside(own, request, await compare(request))
            if cut is not None:
                await compare(cut)

        await asyncio.gather(*(case(rng.randrange(2**31)) for _ in range(NUM_REQUESTS)))
    # What makes the comparison worth its while must have happened.
    assert (stopped >= 40, split >= 80, multi_byte >= 8) == (True, True, True), (stopped, split, multi_byte)
