"""Bad input beyond the rows of `tests/contract`: exact status, code and param, in OpenAI's shape."""

import time
from typing import Any

import msgspec
import pytest

from tests.server.conftest import Serve, Served
from tests.server.fakes import CONTEXT, EOS, VOCAB_SIZE, ready_event

FIELD_ERRORS: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 20, "prompt": ["a"] * 7}, "invalid_value", "best_of"),
    ({"suffix": 1}, "invalid_type", "suffix"),
    ({"min_p": 1.5}, "decimal_above_max_value", "min_p"),
    ({"top_k": -2}, "integer_below_min_value", "top_k"),
    ({"top_k": VOCAB_SIZE + 1}, "integer_above_max_value", "top_k"),
    ({"presence_penalty": "1"}, "invalid_type", "presence_penalty"),
    *(({"repetition_penalty": bad}, "decimal_below_min_value", "repetition_penalty") for bad in (0, -1)),
    ({"repetition_penalty": 2.1}, "decimal_above_max_value", "repetition_penalty"),
    ({"logprobs": 2**63}, "integer_above_max_value", "logprobs"),
    ({"logprobs": 1.0}, "invalid_type", "logprobs"),
    ({"echo": 1}, "invalid_type", "echo"),
    ({"min_tokens": -1}, "integer_below_min_value", "min_tokens"),
    ({"min_tokens": 17}, "invalid_value", "min_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "invalid_value", "min_tokens"),
    ({"logit_bias": True}, "invalid_type", "logit_bias"),
    ({"logit_bias": {"1": -100.5}}, "invalid_value", "logit_bias"),
    ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "invalid_type", "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "array_above_max_length", "stop_token_ids"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "invalid_type",
        "stream_options.include_usage",
    ),
    ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
    ({"ignore_eos": 0}, "invalid_type", "ignore_eos"),
    *(({"speculative": bad}, "invalid_type", "speculative") for bad in (True, "mtad", [], 1)),
    ({"speculative": {"foo": 1}}, "unknown_parameter", "speculative.foo"),
    ({"speculative": {"method": "beam"}}, "invalid_value", "speculative.method"),
    ({"speculative": {"acceptance": "tokens"}}, "invalid_value", "speculative.acceptance"),
    *(
        ({"speculative": {"candidates_per_level": bad}}, code, "speculative.candidates_per_level")
        for bad, code in (
            ([0], "invalid_value"),
            ([17], "invalid_value"),
            ([1] * 17, "array_above_max_length"),
            ([4, 4, 4], "invalid_value"),
            ([2.0], "invalid_type"),
            ("2", "invalid_type"),
        )
    ),
    ({"speculative": {"candidates_per_level": []}}, "empty_array", "speculative.candidates_per_level"),
    ({"speculative": {"beam_width": 0}}, "integer_below_min_value", "speculative.beam_width"),
    ({"speculative": {"beam_width": 17}}, "integer_above_max_value", "speculative.beam_width"),
    ({"speculative": {"beam_width": 2.0}}, "invalid_type", "speculative.beam_width"),
    (
        {"speculative": {"num_speculative_tokens": 17}},
        "integer_above_max_value",
        "speculative.num_speculative_tokens",
    ),
    (
        {"speculative": {"num_speculative_tokens": 16, "beam_width": 5}},
        "invalid_value",
        "speculative.beam_width",
    ),
    (
        {"speculative": {"method": "target", "num_speculative_tokens": 16, "beam_width": 5}},
        "invalid_value",
        "speculative.beam_width",
    ),
    (
        {"speculative": {"acceptance_threshold": -0.1}},
        "decimal_below_min_value",
        "speculative.acceptance_threshold",
    ),
    (
        {"speculative": {"acceptance_threshold": 1e7}},
        "decimal_above_max_value",
        "speculative.acceptance_threshold",
    ),
    (
        {"speculative": {"acceptance_reference": "best"}},
        "invalid_value",
        "speculative.acceptance_reference",
    ),
    ({"speculative": {"metrics": "all"}}, "invalid_value", "speculative.metrics"),
    ({"model": "tiny-draft", "speculative": {"method": "mtad"}}, "invalid_value", "speculative.method"),
    ({"model": "tiny-draft", "speculative": False}, "invalid_value", "speculative"),
]

ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 1},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": VOCAB_SIZE},
    {"prompt": [EOS]},
    {"prompt": "x" * (CONTEXT - 16)},
    {"best_of": 3, "n": 3},
    {"best_of": 1, "stream": True},
    {"logprobs": 0},
    {"logprobs": 5, "stream": True},
    {"echo": True},
    {"echo": True, "logprobs": 5, "max_tokens": 0},
    {"logit_bias": {}},
    {"logit_bias": {str(token): -100 for token in range(VOCAB_SIZE)}},
    {"min_tokens": 16},
    {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 2},
    {"speculative": {"method": "multi_candidate", "candidates_per_level": [1] * 16}},
    {"speculative": {"method": "mtjd", "candidates_per_level": [16]}},
    {"speculative": {"acceptance": "token", "acceptance_threshold": 1e6}},
    {"speculative": {"method": "target", "beam_width": 16}},
]


def check_error(response: Any, status: int, code: str | None, param: str | None) -> str:
    """The whole contract of an error body; returns its message."""
    assert response.status_code == status
    assert len(response.content) <= 2048
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    expected = {429: "rate_limit_error", 503: "overloaded_error", 500: "server_error"}.get(
        status, "invalid_request_error"
    )
    assert error["type"] == expected
    assert error["message"]
    return str(error["message"])


@pytest.mark.parametrize(("fields", "code", "param"), FIELD_ERRORS)
async def test_field_errors(served: Served, fields: dict[str, Any], code: str, param: str) -> None:
    response = await served.complete(**fields)
    message = check_error(response, 400, code, param)
    assert f"'{param}'" in message or code == "context_length_exceeded"
    assert served.engine.added == []


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
async def test_accepted(served: Served, fields: dict[str, Any]) -> None:
    assert (await served.complete(**fields)).status_code == 200


@pytest.mark.parametrize("limit", [0, 20])
async def test_configured_log_probs(serve: Serve, limit: int) -> None:
    async with serve(max_logprobs=limit) as served:
        assert (await served.complete(logprobs=limit)).status_code == 200
        response = await served.complete(logprobs=limit + 1)
        check_error(response, 400, "integer_above_max_value", "logprobs")


@pytest.mark.parametrize("method", ["draft", "speculative", "multi_candidate", "mtad", "mmtad"])
async def test_methods_that_need_a_draft(serve: Serve, method: str) -> None:
    async with serve(has_draft=False) as served:
        response = await served.complete(speculative={"method": method})
        check_error(response, 400, "unsupported_parameter", "speculative.method")
        assert (await served.complete()).json()["metrics"]["speculative"] == {"method": "target"}
        assert (await served.complete(speculative={"method": "mtjd"})).status_code == 200


@pytest.mark.parametrize("limit", ["beam_width", "num_speculative_tokens"])
async def test_configured_limits(serve: Serve, limit: str) -> None:
    async with serve(**{f"max_{limit}": 5}) as served:
        response = await served.complete(speculative={limit: 6})
        check_error(response, 400, "integer_above_max_value", f"speculative.{limit}")


async def test_a_prompt_needs_a_token_to_start_from(serve: Serve) -> None:
    async with serve() as served:
        served.pool.model = msgspec.structs.replace(ready_event(""), bos_token_id=None, eos_token_ids=[])
        check_error(await served.complete(prompt=""), 400, "invalid_value", "prompt")
        served.pool.model = msgspec.structs.replace(ready_event(""), bos_token_id=None)
        assert (await served.complete(prompt="")).status_code == 200
        assert served.engine.added[0].prompt_ids == [EOS]


async def test_what_only_the_engine_refuses_is_400(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ValueError("prompt_ids must be otherwise")

    monkeypatch.setattr(served.engine, "add", refuse)
    check_error(await served.complete(), 400, "invalid_value", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", {f"x{key}": 1 for key in range(50_000)}), ("stop", [5] * 100_000)],
)
async def test_large_mistakes_are_quick(served: Served, field: str, value: Any) -> None:
    started = time.perf_counter()
    response = await served.complete(**{field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert time.perf_counter() - started < 1
