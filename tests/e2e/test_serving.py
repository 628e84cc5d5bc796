"""Requests against a real server: text, streams, clients, cancellation, counters."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.conftest import RunningServer, until

pytestmark = pytest.mark.slow

METHODS = ("target", "draft", "speculative", "mtad", "mmtad")


def complete(server: RunningServer, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "The quick brown", "temperature": 0, "max_tokens": 24, **fields}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def stream(server: RunningServer, **fields: Any) -> dict[str, Any]:
    """The same request streamed, put together again."""
    body = {"model": "tiny", "prompt": "The quick brown", "temperature": 0, "max_tokens": 24, **fields}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    result: dict[str, Any] = {"text": "", "finish_reason": None}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        chunk = json.loads(line.removeprefix("data: "))
        for choice in chunk["choices"]:
            result["text"] += choice["text"]
            result["finish_reason"] = choice["finish_reason"]
        result["usage"] = chunk["usage"]
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_equals_whole(server: RunningServer, method: str, temperature: float) -> None:
    fields = {"speculative": {"method": method}, "temperature": temperature, "seed": 7}
    whole = complete(server, **fields)
    streamed = stream(server, **fields)
    choice = whole["choices"][0]
    assert (streamed["text"], streamed["finish_reason"]) == (choice["text"], choice["finish_reason"])
    assert streamed["usage"] == whole["usage"]
    assert whole["metrics"]["speculative"]["method"] == method
    if method in ("speculative", "mtad", "mmtad"):
        speculation = whole["metrics"]["speculative_decoding"]
        histogram = speculation["acceptance_histogram"]
        assert sum(histogram) == speculation["num_spec_steps"] > 0
        accepted = sum(length * count for length, count in enumerate(histogram))
        assert accepted == speculation["num_accepted_draft_tokens"] <= speculation["num_draft_tokens"]


def test_stop_strings_cut_streams_and_wholes_alike(server: RunningServer) -> None:
    text = complete(server, ignore_eos=True)["choices"][0]["text"]
    stop = next(
        text[start : start + 2] for start in range(6, len(text)) if "\ufffd" not in text[start : start + 2]
    )
    whole = complete(server, stop=stop, ignore_eos=True)
    streamed = stream(server, stop=stop, ignore_eos=True)
    assert whole["choices"][0]["text"] == streamed["text"] == text[: text.index(stop)]
    assert whole["choices"][0]["stop_reason"] == stop
    assert streamed["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] < 24


def leave_early(server: RunningServer, **fields: Any) -> None:
    """Start a stream, take its first event, and go."""
    body = {"model": "tiny", "stream": True, **fields}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")


def test_sixteen_mixed_requests_get_what_they_get_alone(server: RunningServer) -> None:
    """Guards against neighbours, joins, leaves and cancellations that reach another request's text."""
    requests: list[dict[str, Any]] = [
        {
            "speculative": {"method": METHODS[number % 5], "num_speculative_tokens": 1 + number % 4},
            "prompt": "word " * (1 + 2 * number),
            "max_tokens": 5 + 295 * number // 15,
            "temperature": number % 3 / 2,
            "n": 1 + (number == 3),
            "ignore_eos": True,
            "seed": number,
        }
        for number in range(16)
    ]
    leavers = (9, 11, 13, 14)
    before = server.metric("mmtad_generation_tokens_total")
    aborted = server.metric("mmtad_requests_total", finish_reason="abort")
    with ThreadPoolExecutor(16) as executor:
        together = [
            executor.submit(leave_early if number in leavers else complete, server, **fields)
            for number, fields in enumerate(requests)
        ]
    results = {number: future.result() for number, future in enumerate(together)}
    until(lambda: server.metric("mmtad_requests_total", finish_reason="abort") == aborted + 4, 10)
    until(lambda: server.metric("mmtad_requests_running") == 0, 10)
    delivered = 0
    for number, fields in enumerate(requests):
        if number in leavers:
            continue
        result = results[number]
        assert [choice["finish_reason"] for choice in result["choices"]] == ["length"] * fields["n"]
        assert result["usage"]["completion_tokens"] == fields["n"] * fields["max_tokens"]
        assert result["choices"] == complete(server, **fields)["choices"], fields
        delivered += 2 * result["usage"]["completion_tokens"]
    assert server.metric("mmtad_generation_tokens_total") - before > delivered  # and what the leavers got


def test_openai_client(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert next(model.id for model in client.models.list()) == "tiny"
        assert client.models.retrieve("tiny").id == "tiny"
        whole = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=12, temperature=0, extra_body={"speculative": False}
        )
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == 5
        assert whole._request_id
        chunks = client.completions.create(
            model="tiny",
            prompt="Hello",
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"speculative": False},
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="unknown", prompt="Hello")
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="tiny", prompt="Hello", max_tokens=100_000)
        assert error.value.code == "context_length_exceeded"


def test_a_client_that_leaves_frees_its_rows(server: RunningServer) -> None:
    aborted = server.metric("mmtad_requests_total", finish_reason="abort")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "n": 4, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: the response is closed with its iterator
        next(lines)
        until(lambda: server.metric("mmtad_requests_running") == 4, 5)
    until(lambda: server.metric("mmtad_requests_running") == 0, 5)
    assert server.metric("mmtad_requests_total", finish_reason="abort") == aborted + 1


def test_max_tokens_zero(server: RunningServer) -> None:
    result = complete(server, max_tokens=0)
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 0


def test_metrics_agree_with_usage(server: RunningServer) -> None:
    before = {method: server.metric("mmtad_generation_tokens_total", method=method) for method in METHODS}
    for method in METHODS:
        used = complete(server, speculative={"method": method}, n=2)["usage"]["completion_tokens"]
        delivered = server.metric("mmtad_generation_tokens_total", method=method) - before[method]
        assert delivered == used
    assert server.metric("mmtad_worker_up", worker="0") == 1
    assert 0 <= server.metric("mmtad_kv_cache_usage_ratio", role="target") <= 1
