"""Requests against a real server: text, streams, clients, cancellation, counters."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.text import TextCodec
from tests.e2e.conftest import RunningServer, until
from tests.e2e.tiny import VOCAB_SIZE, byte_tokenizer

pytestmark = pytest.mark.slow

METHODS = ("target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad")


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


def counts(result: dict[str, Any]) -> dict[str, int]:
    """Tokens of a response, without what was cached of them, which depends on who came before."""
    return {name: count for name, count in result["usage"].items() if name != "prompt_tokens_details"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_equals_whole(server: RunningServer, method: str, temperature: float) -> None:
    fields = {"speculative": {"method": method}, "temperature": temperature, "seed": 7}
    whole = complete(server, **fields)
    streamed = stream(server, **fields)
    choice = whole["choices"][0]
    assert (streamed["text"], streamed["finish_reason"]) == (choice["text"], choice["finish_reason"])
    assert counts(streamed) == counts(whole)
    assert whole["metrics"]["speculative"]["method"] == method
    if method in ("speculative", "multi_candidate", "mtad", "mmtad"):
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
    assert counts(streamed) == counts(whole)
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
            "speculative": {
                "method": METHODS[number % len(METHODS)],
                "num_speculative_tokens": 1 + number % 4,
            },
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


EVERYTHING = {
    "presence_penalty": 1.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.3,
    "logit_bias": {"5": 3, "6": -100},
    "min_tokens": 4,
    "logprobs": 3,
    "echo": True,
    "temperature": 0.8,
    "min_p": 0.02,
    "seed": 3,
}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_with_every_method(server: RunningServer, method: str) -> None:
    """CVE-2026-44223: one penalty with speculation killed another server's engine."""
    result = complete(server, **EVERYTHING, speculative={"method": method}, n=2)
    for choice in result["choices"]:
        shown = choice["logprobs"]
        assert choice["text"].startswith("The quick brown")
        num_prompt = result["usage"]["prompt_tokens"]
        assert shown["token_logprobs"][0] is None
        assert all(-9999 <= value <= 0 for value in shown["token_logprobs"][1:])
        assert all(3 <= len(top) <= 4 for top in shown["top_logprobs"][1:])
        assert "bytes:" in shown["tokens"][0] or choice["text"].startswith(shown["tokens"][0])
        assert len(shown["tokens"]) >= num_prompt + 4
    delivered = sum(len(choice["logprobs"]["tokens"]) - num_prompt for choice in result["choices"])
    assert delivered == result["usage"]["completion_tokens"]


def test_scores_of_a_prompt_are_those_of_its_decoding(server: RunningServer) -> None:
    """What `echo` says of a text is what was said when the text was written, within rounding."""
    written = complete(server, speculative=False, logprobs=0, max_tokens=8, prompt=[256, 5, 9])
    prompt = [256, 5, 9]
    codec = TextCodec(byte_tokenizer())
    id_of = {codec.token_text(token_id): token_id for token_id in range(VOCAB_SIZE)}
    ids = prompt + [id_of[token] for token in written["choices"][0]["logprobs"]["tokens"]]
    scored = complete(server, speculative=False, logprobs=1, max_tokens=0, echo=True, prompt=ids)
    values = scored["choices"][0]["logprobs"]["token_logprobs"][len(prompt) :]
    assert values == pytest.approx(written["choices"][0]["logprobs"]["token_logprobs"], abs=2e-2)


def test_bias_against_everything(server: RunningServer) -> None:
    bias = {str(token): -100 for token in range(260)}
    for method in METHODS:
        result = complete(server, logit_bias=bias, speculative={"method": method}, temperature=1, seed=1)
        assert result["choices"][0]["finish_reason"] in ("stop", "length")


def test_best_of(server: RunningServer) -> None:
    result = complete(server, best_of=5, n=2, temperature=1, seed=1, logprobs=0)
    means = [
        sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])
        for choice in result["choices"]
    ]
    assert means == sorted(means, reverse=True)
    assert result["usage"]["completion_tokens"] > 48


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


@pytest.mark.parametrize("method", ["target", "draft", "mmtad"])
def test_prompts_that_begin_alike_share(server: RunningServer, method: str) -> None:
    """Usage and metrics say how much; a text of its own is computed whole."""
    names = ("mmtad_prefix_cache_query_tokens_total", "mmtad_prefix_cache_hit_tokens_total")
    before = [server.metric(name) for name in names]
    shared = f"{method}: these words begin two prompts. "
    uses = [complete(server, prompt=shared + end, speculative={"method": method})["usage"] for end in "ab"]
    cached = [use["prompt_tokens_details"]["cached_tokens"] for use in uses]
    assert cached[0] < uses[0]["prompt_tokens"] / 2 < cached[1] < uses[1]["prompt_tokens"]
    after = [server.metric(name) for name in names]
    assert after[0] - before[0] == uses[0]["prompt_tokens"] + uses[1]["prompt_tokens"]
    assert after[1] - before[1] == sum(cached)


def test_metrics_agree_with_usage(server: RunningServer) -> None:
    before = {method: server.metric("mmtad_generation_tokens_total", method=method) for method in METHODS}
    for method in METHODS:
        used = complete(server, speculative={"method": method}, n=2)["usage"]["completion_tokens"]
        delivered = server.metric("mmtad_generation_tokens_total", method=method) - before[method]
        assert delivered == used
    assert server.metric("mmtad_worker_up", worker="0") == 1
    assert 0 <= server.metric("mmtad_kv_cache_usage_ratio", role="target") <= 1
