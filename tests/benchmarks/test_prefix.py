"""Prompts that begin alike and no further, and what is counted of their answers."""

import json
from typing import Any

import httpx
import pytest

from benchmarks.prefix import measure, prompts


def test_prompts_are_alike_up_to_a_place_and_differ_in_the_next() -> None:
    token_ids = [7, 8, 9, *([1, 1] * 3), 2, 1, 3, 3, 4, 1]
    made = prompts(token_ids, shared=3, own=2, count=4)
    assert made == [[7, 8, 9, *end] for end in ([1, 1], [2, 1], [3, 3], [4, 1])]
    with pytest.raises(ValueError, match="no 5 prompts"):
        prompts(token_ids, shared=3, own=2, count=5)


def test_first_requests_are_not_counted() -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        asked.append(json.loads(request.content))
        number = len(asked)
        usage = {"prompt_tokens_details": {"cached_tokens": 10 * number}}
        return httpx.Response(
            200, json={"usage": usage, "metrics": {"time_to_first_token_ms": 1000.0 / number}}
        )

    with httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer)) as client:
        found = measure(client, "mmtad", [[number] for number in range(5)])
    assert found == {"ttft_ms": 250.0, "cached_tokens": 40}
    assert [body["prompt"] for body in asked] == [[0], [1], [2], [3], [4]]
    assert {body["speculative"]["method"] for body in asked} == {"mmtad"}
