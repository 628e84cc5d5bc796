"""Every bad input has its exact status, code and param, in OpenAI's shape."""

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest

from server.limits import HttpLimits
from tests.server.conftest import Serve, Served
from tests.server.fakes import CONTEXT, EOS, VOCAB_SIZE, ready_event

NESTED = b"[" * 900 + b"]" * 900
HUGE = 10**9

NOT_JSON = {
    "empty": b"",
    "truncated": b'{"model": "tiny"',
    "trailing garbage": b'{"model": "tiny"} x',
    "raw control byte": b'{"model": "ti\x01ny"}',
    "byte order mark": b'\xef\xbb\xbf{"model": "tiny"}',
    "utf-16": '{"model": "tiny"}'.encode("utf-16"),
    "latin-1": '{"model": "tïny"}'.encode("latin-1"),
    "invalid utf-8": b'{"model": "tiny", "prompt": "\xff"}',
    "lone surrogate": b'{"model": "tiny", "prompt": "\\ud800"}',
    "surrogate in a key": b'{"model": "tiny", "\\udc00": 1}',
    "nesting 900": b'{"model": "tiny", "prompt": ' + NESTED + b"}",
    "nesting 100,000": b"[" * 100_000,
    "nesting of objects": b'{"a":' * 100_000,
    "million brackets": b"[" * 1_000_000,
    "number of 5,000 digits": b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
}

FIELD_ERRORS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 5}, "invalid_type", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"model": "m" * 257}, "string_above_max_length", "model"),
    ({"foo": 1}, "unknown_parameter", "foo"),
    ({f"foo{i}": 1 for i in range(1000)}, "unknown_parameter", "foo0"),
    *(
        ({name: "x"}, "unknown_parameter", name)
        for name in ("prompt_embeds", "guided_json", "image_url", "chat_template", "priority")
    ),
    ({"prompt": []}, "empty_array", "prompt"),
    ({"prompt": [[]]}, "empty_array", "prompt"),
    ({"prompt": [[1], []]}, "empty_array", "prompt"),
    *(
        ({"prompt": bad}, "invalid_type", "prompt")
        for bad in ([1, "a"], [True], [1.0], [None], {}, 5, ["a", 1])
    ),
    ({"prompt": ["a"] * 65}, "array_above_max_length", "prompt"),
    ({"prompt": [[1]] * 65}, "array_above_max_length", "prompt"),
    *(({"prompt": [bad]}, "invalid_value", "prompt") for bad in (-1, VOCAB_SIZE, 2**31, 2**63)),
    ({"prompt": [1] * CONTEXT}, "context_length_exceeded", "prompt"),
    ({"prompt": "x" * CONTEXT}, "context_length_exceeded", "prompt"),
    ({"prompt": "x" * 900_000}, "context_length_exceeded", "prompt"),
    ({"max_tokens": -1}, "integer_below_min_value", "max_tokens"),
    ({"max_tokens": HUGE}, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 2**63}, "integer_above_max_value", "max_tokens"),
    *(({"max_tokens": bad}, "invalid_type", "max_tokens") for bad in (1.5, "16", True)),
    *(({"n": bad}, "integer_below_min_value", "n") for bad in (0, -1)),
    *(({"n": bad}, "integer_above_max_value", "n") for bad in (129, HUGE)),
    *(({"n": bad}, "invalid_type", "n") for bad in (True, "2", 2.0)),
    ({"n": 65, "prompt": ["a", "b"]}, "invalid_value", "n"),
    ({"best_of": 21}, "integer_above_max_value", "best_of"),
    ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
    ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
    ({"best_of": 2, "n": 2, "stream": True}, "invalid_value", "best_of"),
    ({"best_of": 0}, "integer_below_min_value", "best_of"),
    ({"best_of": 20, "prompt": ["a"] * 7}, "invalid_value", "best_of"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ({"suffix": ""}, "unsupported_parameter", "suffix"),
    ({"suffix": 1}, "invalid_type", "suffix"),
    ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    *(({"temperature": bad}, "invalid_type", "temperature") for bad in ("0.7", True)),
    ({"top_p": -0.1}, "decimal_below_min_value", "top_p"),
    ({"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    ({"min_p": 1.5}, "decimal_above_max_value", "min_p"),
    ({"top_k": -2}, "integer_below_min_value", "top_k"),
    ({"top_k": VOCAB_SIZE + 1}, "integer_above_max_value", "top_k"),
    *(
        ({name: bad}, f"decimal_{where}_value", name)
        for name in ("presence_penalty", "frequency_penalty")
        for bad, where in ((2.1, "above_max"), (-2.1, "below_min"))
    ),
    ({"presence_penalty": "1"}, "invalid_type", "presence_penalty"),
    *(({"repetition_penalty": bad}, "decimal_below_min_value", "repetition_penalty") for bad in (0, -1)),
    ({"repetition_penalty": 2.1}, "decimal_above_max_value", "repetition_penalty"),
    ({"logprobs": -1}, "integer_below_min_value", "logprobs"),
    *(({"logprobs": bad}, "integer_above_max_value", "logprobs") for bad in (6, HUGE, 2**63)),
    *(({"logprobs": bad}, "invalid_type", "logprobs") for bad in (True, "5", 1.0)),
    ({"echo": 1}, "invalid_type", "echo"),
    ({"min_tokens": -1}, "integer_below_min_value", "min_tokens"),
    ({"min_tokens": 17}, "invalid_value", "min_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "invalid_value", "min_tokens"),
    *(({"logit_bias": bad}, "invalid_type", "logit_bias") for bad in ([], "x", 5, True)),
    *(
        ({"logit_bias": {key: 1}}, "invalid_value", "logit_bias")
        for key in ("abc", "-1", str(VOCAB_SIZE), " 1", "1 ", "1e3", "01", "+1", "1.0", "", "١", "9" * 5000)
    ),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": -100.5}}, "invalid_value", "logit_bias"),
    *(({"logit_bias": {"1": bad}}, "invalid_type", "logit_bias") for bad in ("5", None, True, [1])),
    ({"logit_bias": {str(key): 1 for key in range(301)}}, "invalid_value", "logit_bias"),
    *(({"stop": bad}, "invalid_value", "stop") for bad in ("", [""])),
    *(({"stop": bad}, "invalid_type", "stop") for bad in ([1], 3, {})),
    *(({"stop": ["x"] * count}, "array_above_max_length", "stop") for count in (17, 1000)),
    *(({"stop": bad}, "string_above_max_length", "stop") for bad in ("x" * 257, ["x" * 257])),
    ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "invalid_type", "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "array_above_max_length", "stop_token_ids"),
    ({"seed": 2**63}, "integer_above_max_value", "seed"),
    ({"seed": -(2**63) - 1}, "integer_below_min_value", "seed"),
    *(({"seed": bad}, "invalid_type", "seed") for bad in (1.5, "1")),
    *(({"stream": bad}, "invalid_type", "stream") for bad in ("yes", 1)),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"stream": False, "stream_options": {}}, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"foo": 1}}, "unknown_parameter", "stream_options.foo"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "invalid_type",
        "stream_options.include_usage",
    ),
    ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
    ({"user": "x" * 10_000}, "string_above_max_length", "user"),
    ({"user": 5}, "invalid_type", "user"),
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
    {"temperature": 1e-9},
    {"temperature": -0.0},
    {"temperature": 1e-3},
    {"temperature": 1},
    {"top_p": 0},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": VOCAB_SIZE},
    {"n": 4},
    {"seed": 0},
    {"seed": -1},
    {"seed": 2**63 - 1},
    {"stop": ["x"] * 16},
    {"stop": "x" * 256},
    {"prompt": "\0\x01 \u202e\u200d"},
    {"prompt": [EOS]},
    {"prompt": "x" * (CONTEXT - 16)},
    {"user": "x" * 512},
    {"best_of": 3, "n": 3},
    {"best_of": 20},
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


async def post(served: Served, body: bytes, **headers: str) -> Any:
    given = {"content-type": "application/json", **headers}
    return await served.client.post("/v1/completions", content=body, headers=given)


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_not_json(served: Served, body: bytes) -> None:
    message = check_error(await post(served, body), 400, None, None)
    assert message.startswith("We could not parse the JSON body")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"1"])
async def test_not_an_object(served: Served, body: bytes) -> None:
    check_error(await post(served, body), 400, "invalid_type", None)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "max_tokens", "n", "seed", "prompt", "top_p", "user"])
async def test_not_finite(served: Served, field: str, number: str) -> None:
    body = f'{{"model": "tiny", "{field}": {number}}}'.encode()
    check_error(await post(served, body), 400, "invalid_type", field)


@pytest.mark.parametrize(("fields", "code", "param"), FIELD_ERRORS)
async def test_field_errors(served: Served, fields: dict[str, Any], code: str, param: str) -> None:
    response = await served.complete(**fields)
    message = check_error(response, 400, code, param)
    assert f"'{param}'" in message or code == "context_length_exceeded"
    assert served.engine.added == []


async def test_context_message_has_the_numbers(served: Served) -> None:
    response = await served.complete(prompt=[1] * 60, max_tokens=10)
    message = check_error(response, 400, "context_length_exceeded", "prompt")
    assert f"this model's maximum context length is {CONTEXT}" in message
    assert "60" in message
    assert "10" in message


async def test_model_is_required(served: Served) -> None:
    response = await served.client.post("/v1/completions", json={"prompt": "x"})
    check_error(response, 400, "missing_required_parameter", "model")


@pytest.mark.parametrize("model", ["gpt-4", "../../etc/passwd", "m" * 256, "tiny "])
async def test_unknown_model(served: Served, model: str) -> None:
    message = check_error(await served.complete(model=model), 404, "model_not_found", "model")
    assert model not in message


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
async def test_accepted(served: Served, fields: dict[str, Any]) -> None:
    assert (await served.complete(**fields)).status_code == 200


async def test_duplicate_keys_last_wins(served: Served) -> None:
    response = await post(served, b'{"model": "x", "max_tokens": 5, "max_tokens": 2, "model": "tiny"}')
    assert response.json()["usage"]["completion_tokens"] == 2


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


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/json; charset=UTF-8", 200),
        ("APPLICATION/JSON", 200),
    ],
)
async def test_content_type(served: Served, content_type: str | None, status: int) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await served.client.post("/v1/completions", content=b'{"model": "tiny"}', headers=headers)
    assert response.status_code == status
    if status == 415:
        check_error(response, 415, "unsupported_media_type", None)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd"])
async def test_content_encoding(served: Served, encoding: str) -> None:
    response = await post(served, b"", **{"content-encoding": encoding})
    check_error(response, 415, "unsupported_media_type", None)


async def test_declared_length_is_refused_unread(served: Served) -> None:
    async def body() -> Any:
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-type": "application/json", "content-length": str(100_000_000)}
    response = await served.client.post("/v1/completions", content=body(), headers=headers)
    check_error(response, 413, "content_too_large", None)
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize(("size", "status"), [(2**20, 200), (2**20 + 1, 413)])
async def test_chunked_body_is_counted(served: Served, size: int, status: int) -> None:
    async def body() -> Any:
        start = b'{"model": "tiny"'
        yield start
        yield b" " * (size - len(start) - 1)
        yield b"}"

    headers = {"content-type": "application/json"}
    response = await served.client.post("/v1/completions", content=body(), headers=headers)
    assert response.status_code == status


async def test_slow_body(serve: Serve) -> None:
    async def body() -> Any:
        yield b"{"
        await asyncio.sleep(10)
        yield b"}"

    headers = {"content-type": "application/json"}
    async with serve(limits=HttpLimits(body_seconds=0.01)) as served:
        response = await served.client.post("/v1/completions", content=body(), headers=headers)
        check_error(response, 408, "request_timeout", None)


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


async def test_length_and_encoding_together(served: Served) -> None:
    response = await post(served, b"{}", **{"transfer-encoding": "chunked", "content-length": "2"})
    check_error(response, 400, None, None)


async def test_too_many_headers(served: Served) -> None:
    response = await served.client.get("/health", headers={f"x-{i}": "1" for i in range(120)})
    check_error(response, 431, None, None)


async def test_too_large_headers(served: Served) -> None:
    response = await served.client.get("/health", headers={"x-huge": "x" * 70_000})
    check_error(response, 431, None, None)


async def test_many_bad_elements_are_one_quick_error(served: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": [[1], *["x"] * 20_000]}).encode()
    started = time.perf_counter()
    check_error(await post(served, body), 400, "invalid_type", "prompt")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", {f"x{key}": 1 for key in range(50_000)}), ("stop", [5] * 100_000)],
)
async def test_large_mistakes_are_quick(served: Served, field: str, value: Any) -> None:
    started = time.perf_counter()
    response = await served.complete(**{field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert time.perf_counter() - started < 1


async def test_requests_work_after_all_this(served: Served) -> None:
    for body in NOT_JSON.values():
        await post(served, body)
    assert (await served.complete()).status_code == 200
