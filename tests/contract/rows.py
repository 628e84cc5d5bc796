"""The bad inputs that the server promises to answer exactly, as data: one list entry per value.

Rows are numbered by their subject, 1 to 57; cases of one row share its promise. Rows that take more
than one request are in `tests.contract.behaviours`.
"""

import json
from collections.abc import Iterable
from typing import Any

from server.schemas import CompletionRequest
from tests.contract.behaviours import BEHAVIOURS
from tests.contract.cases import OMITTED, SMALL, Answer, Body, Case, Fields, Raw
from tests.e2e.tiny import VOCAB_SIZE, byte_tokenizer

CONTEXT = 512
HUGE = 10**9
OK = Answer()
NOT_JSON = Answer(400, message="We could not parse the JSON body")


def bad(code: str, param: str, *, status: int = 400, message: str = "") -> Answer:
    return Answer(status, code, param, message or f"'{param}'")


def values(row: int, field: str, given: Iterable[Any], answer: Answer) -> list[Case]:
    return [Fields(row, {field: value}, answer) for value in given]


def wrong(row: int, field: str, given: Iterable[Any], code: str) -> list[Case]:
    return values(row, field, given, bad(code, field))


def bodies(row: int, given: Iterable[bytes], answer: Answer) -> list[Case]:
    return [Body(row, body, answer) for body in given]


def with_raw(field: str, raw: bytes) -> bytes:
    """A body in which one field is written as it stands."""
    rest = {name: value for name, value in SMALL.items() if name != field}
    return json.dumps(rest).encode()[:-1] + b', "' + field.encode() + b'": ' + raw + b"}"


SURROGATE = b'"\\ud800"'
NESTED = b"[" * 900 + b"]" * 900

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
UNPARSABLE = (
    b"",
    b'{"model": "tiny"',
    b'{"model": "tiny"} x',
    b'{"model": "ti\x01ny"}',
    b'\xef\xbb\xbf{"model": "tiny"}',
    '{"model": "tiny"}'.encode("utf-16"),
    '{"model": "tïny"}'.encode("latin-1"),
)

PARSING: list[Case] = [
    *(Body(1, body, NOT_JSON, path=path) for path in PATHS for body in UNPARSABLE),
    *bodies(2, [b"null", b"[]", b'"x"', b"1"], Answer(400, "invalid_type")),
    *bodies(
        3,
        [
            with_raw("prompt", b'"\xff"'),
            *(with_raw(field, SURROGATE) for field in ("model", "prompt", "stop", "user", "suffix")),
            *(with_raw(field, b"[" + SURROGATE + b"]") for field in ("prompt", "stop")),
            with_raw("logit_bias", b"{" + SURROGATE + b": 1}"),
            with_raw("speculative", b'{"method": ' + SURROGATE + b"}"),
            b'{"model": "tiny", ' + SURROGATE + b": 1}",
        ],
        NOT_JSON,
    ),
    *bodies(
        4,
        [
            with_raw("prompt", NESTED),
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"[" * 1_000_000,
            with_raw("prompt", b"[" * 500_000 + b"]" * 500_000),
        ],
        Answer(400, message="We could not parse the JSON body", within=0.1),
    ),
    Body(
        5,
        b'{"model": "x", "max_tokens": 5, "max_tokens": 2, "model": "tiny", "ignore_eos": true}',
        Answer(check=lambda body: _equal(body["usage"]["completion_tokens"], 2)),
    ),
    *bodies(6, (with_raw(name, b"9" * 5000) for name in CompletionRequest.model_fields), NOT_JSON),
    *(
        Body(6, with_raw(name, number), bad("invalid_type", name))
        for name in CompletionRequest.model_fields
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999")
    ),
    *(
        Body(6, with_raw(field, raw), bad("invalid_type", param))
        for field, raw, param in (
            ("prompt", b"[NaN]", "prompt"),
            ("prompt", b"[[1], [1e999]]", "prompt"),
            ("stop", b"[NaN]", "stop"),
            ("logit_bias", b'{"1": Infinity}', "logit_bias"),
            ("stream_options", b'{"include_usage": NaN}', "stream_options.include_usage"),
            ("speculative", b'{"acceptance_threshold": NaN}', "speculative.acceptance_threshold"),
            ("speculative", b'{"beam_width": 1e999}', "speculative.beam_width"),
        )
    ),
]

BODY = json.dumps(SMALL).encode()
UNSUPPORTED_TYPE = Answer(415, "unsupported_media_type")


def head(*lines: str) -> bytes:
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode()


TYPED = "Content-Type: application/json"
CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

HTTP: list[Case] = [
    *(
        Body(7, BODY, UNSUPPORTED_TYPE, headers)
        for headers in (
            {},
            {"content-type": "text/plain"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "multipart/form-data; boundary=x"},
        )
    ),
    Body(8, BODY, OK, {"content-type": "application/json; charset=UTF-8"}),
    Body(8, BODY, OK, {"content-type": "APPLICATION/JSON"}),
    *(
        # Without a byte of the body: who waited for it would not answer.
        Raw(
            9,
            encoding,
            head("Host: x", TYPED, f"Content-Encoding: {encoding}", "Content-Length: 10"),
            (415,),
            "unsupported_media_type",
        )
        for encoding in ("gzip", "br", "zstd")
    ),
    Raw(
        10,
        "declared 100 MB",
        head("Host: x", TYPED, "Content-Length: 100000000"),
        (413,),
        "content_too_large",
    ),
    Raw(
        10,
        "chunked over the limit",
        head("Host: x", TYPED, "Transfer-Encoding: chunked") + 17 * CHUNK,
        (413,),
        "content_too_large",
    ),
    Body(10, BODY.ljust(2**20), OK),
    Raw(
        10,
        "one byte too much",
        head("Host: x", TYPED, f"Content-Length: {2**20 + 1}"),
        (413,),
        "content_too_large",
    ),
    *(
        Raw(11, ", ".join(lines), head("Host: x", TYPED, *lines) + b"{}", (400,))
        for lines in (
            ("Content-Length: -1",),
            ("Content-Length: x",),
            ("Content-Length: 2", "Content-Length: 3"),
            ("Content-Length: 2", "Transfer-Encoding: chunked"),
        )
    ),
    Raw(12, "one header over 64 KiB", head("Host: x", "X-Huge: " + "x" * 70_000), (400, 431)),
    Raw(
        12,
        "120 headers",
        head("Host: x", "Content-Length: 0", *(f"X-{i}: 1" for i in range(120))),
        (431,),
    ),
    Raw(12, "no Host", head(TYPED, "Content-Length: 0"), (400,)),
    *(
        Body(14, b"", Answer(405), {}, method, path)
        for path in PATHS
        for method in ("GET", "PUT", "DELETE", "TRACE", "PATCH", "OPTIONS")
    ),
]


def _equal(one: Any, other: Any) -> None:
    assert one == other


def _ends_at_length(body: dict[str, Any]) -> None:
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert body["usage"]["completion_tokens"] == 0
    assert body["metrics"]["tokens_per_second"] is None


def _is_scored(body: dict[str, Any]) -> None:
    (choice,) = body["choices"]
    assert choice["text"] == "abc"
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert len(others) == 2
    assert all(value <= 0 for value in others)


def _four_equal_choices(body: dict[str, Any]) -> None:
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in body["choices"]}) == 1


def _is_finite(body: dict[str, Any]) -> None:
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert all(-9999 <= value <= 0 for value in choice["logprobs"]["token_logprobs"])


def _ends(body: dict[str, Any]) -> None:
    assert all(choice["finish_reason"] in ("stop", "length") for choice in body["choices"])


def _echoes(prompt: str) -> Answer:
    def check(body: dict[str, Any]) -> None:
        assert body["choices"][0]["text"].startswith(prompt)

    return Answer(check=check)


MODEL: list[Case] = [
    Fields(20, {"model": OMITTED}, bad("missing_required_parameter", "model")),
    *wrong(20, "model", [5, None, [], True], "invalid_type"),
    *wrong(20, "model", [""], "invalid_value"),
    *values(
        21,
        "model",
        ["gpt-4", "../../etc/passwd", "m" * 256, "tiny ", "TINY"],
        bad("model_not_found", "model", status=404),
    ),
    *wrong(21, "model", ["m" * 257, "m" * 300], "string_above_max_length"),
    *wrong(22, "foo", [1], "unknown_parameter"),
    Fields(22, {f"foo{i}": 1 for i in range(1000)}, bad("unknown_parameter", "foo0")),
    *(
        Fields(51, {name: "x"}, bad("unknown_parameter", name))
        for name in ("prompt_embeds", "guided_json", "image_url", "chat_template", "priority")
    ),
]

UNUSUAL_TEXTS = [
    "nul\0in\0it",
    "\x01\x02\x1f\x7f",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u202eשלום\u202c",
    "a\U0001f600",
]

PROMPT: list[Case] = [
    *values(23, "prompt", [OMITTED, None, ""], OK),
    *wrong(24, "prompt", [[], [[]], [[1], []]], "empty_array"),
    *wrong(24, "prompt", [[1, "a"], [True], [1.0], [None], {}, 5, ["a", 1], [[1], ["a"]]], "invalid_type"),
    *wrong(25, "prompt", [["a"] * 65, [[1]] * 65], "array_above_max_length"),
    *wrong(26, "prompt", [[-1], [VOCAB_SIZE], [2**31], [2**63], [[1], [VOCAB_SIZE]]], "invalid_value"),
    Body(
        27,
        json.dumps({"model": "tiny", "prompt": [[1], *["x"] * 20_000]}).encode(),
        Answer(400, "invalid_type", "prompt", within=0.2),
    ),
    *(Fields(28, {"prompt": text, "echo": True}, _echoes(text)) for text in UNUSUAL_TEXTS),
    # The tokenizer cannot write these bytes alone: half an emoji as token ids, then its other half.
    Fields(28, {"prompt": byte_tokenizer().encode("a\U0001f600").ids[:3], "echo": True}, _echoes("a")),
    Fields(
        29,
        {"prompt": [1] * 500, "max_tokens": 13},
        bad(
            "context_length_exceeded",
            "prompt",
            message="this model's maximum context length is 512 tokens, but the request asks for 500 "
            "in the prompt plus 13",
        ),
    ),
    Fields(29, {"prompt": [1] * 500, "max_tokens": 12}, OK),
    *values(
        29,
        "prompt",
        [[1] * CONTEXT, "x" * CONTEXT],
        bad("context_length_exceeded", "prompt", message=f"maximum context length is {CONTEXT}"),
    ),
    Fields(
        30,
        {"prompt": "x" * 1_000_000},
        Answer(400, "context_length_exceeded", "prompt", "at least", within=1.0),
    ),
]

SAMPLING: list[Case] = [
    *values(31, "max_tokens", [0], Answer(check=_ends_at_length)),
    *wrong(32, "max_tokens", [-1], "integer_below_min_value"),
    *wrong(32, "max_tokens", [HUGE], "context_length_exceeded"),
    *wrong(32, "max_tokens", [2**63], "integer_above_max_value"),
    *wrong(32, "max_tokens", [1.5, "16", True], "invalid_type"),
    *(Fields(33, {name: None}, OK) for name in ("max_tokens", "n", "temperature")),
    *wrong(34, "n", [0, -1], "integer_below_min_value"),
    *wrong(34, "n", [129, HUGE], "integer_above_max_value"),
    *wrong(34, "n", [True, "2", 2.0], "invalid_type"),
    Fields(35, {"n": 65, "prompt": ["a", "b"]}, bad("invalid_value", "n")),
    Fields(35, {"n": 64, "prompt": ["a", "b"], "max_tokens": 1}, Answer(check=_ends)),
    Fields(36, {"n": 4}, Answer(check=_four_equal_choices)),
    *wrong(37, "best_of", [21], "integer_above_max_value"),
    *wrong(37, "best_of", [0], "integer_below_min_value"),
    Fields(37, {"best_of": 1, "n": 2}, bad("invalid_value", "best_of")),
    Fields(37, {"best_of": 2, "stream": True}, bad("invalid_value", "best_of")),
    Fields(37, {"best_of": 2, "n": 2, "stream": True}, bad("invalid_value", "best_of")),
    Fields(37, {"best_of": 20}, OK),
    *wrong(37, "suffix", ["x", ""], "unsupported_parameter"),
    *wrong(38, "temperature", [-0.1], "decimal_below_min_value"),
    *wrong(38, "temperature", [2.1], "decimal_above_max_value"),
    *wrong(38, "temperature", ["0.7", True], "invalid_type"),
    *(
        Fields(39, {"temperature": value, "logprobs": 1, "ignore_eos": True}, Answer(check=_is_finite))
        for value in (1e-9, -0.0, 1e-3)
    ),
    *wrong(40, "top_p", [-0.1], "decimal_below_min_value"),
    *wrong(40, "top_p", [1.1], "decimal_above_max_value"),
    Fields(
        40, {"top_p": 0, "temperature": 1, "n": 4, "speculative": False}, Answer(check=_four_equal_choices)
    ),
    *(
        case
        for name in ("presence_penalty", "frequency_penalty")
        for case in (
            *wrong(41, name, [2.1], "decimal_above_max_value"),
            *wrong(41, name, [-2.1], "decimal_below_min_value"),
            *values(41, name, [2, -2, 0.5], Answer(check=_ends)),
        )
    ),
    *wrong(42, "logprobs", [-1], "integer_below_min_value"),
    *wrong(42, "logprobs", [6, HUGE], "integer_above_max_value"),
    *wrong(42, "logprobs", [True, "5"], "invalid_type"),
    Fields(
        43,
        {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0},
        Answer(check=_is_scored),
    ),
    *(
        Fields(44, {"logit_bias": {key: 1}}, bad("invalid_value", "logit_bias"))
        for key in ("abc", "-1", str(VOCAB_SIZE), " 1", "1 ", "1e3", "01", "+1", "1.0", "", "١", "9" * 5000)
    ),
    Fields(44, {"logit_bias": {"1": 101}}, bad("invalid_value", "logit_bias")),
    *(
        Fields(44, {"logit_bias": {"1": value}}, bad("invalid_type", "logit_bias"))
        for value in ("5", None, True, [1])
    ),
    *wrong(44, "logit_bias", [{str(key): 1 for key in range(301)}], "invalid_value"),
    *wrong(44, "logit_bias", [[], "x", 5], "invalid_type"),
    Fields(
        45,
        {"logit_bias": {str(key): -100 for key in range(VOCAB_SIZE)}, "temperature": 1, "logprobs": 1},
        Answer(check=_is_finite),
    ),
    *wrong(46, "stop", ["", [""], ["a", ""]], "invalid_value"),
    *wrong(46, "stop", [[1], 3, {}], "invalid_type"),
    *wrong(46, "stop", [["x"] * 17, ["x"] * 1000], "array_above_max_length"),
    *wrong(46, "stop", ["x" * 257, ["x" * 257]], "string_above_max_length"),
    *values(46, "stop", [["x"] * 16, "x" * 256], OK),
    *values(47, "stop", [None, []], OK),
    *values(48, "seed", [-1, 0, -(2**63), 2**63 - 1], OK),
    *wrong(48, "seed", [2**63], "integer_above_max_value"),
    *wrong(48, "seed", [-(2**63) - 1], "integer_below_min_value"),
    *wrong(48, "seed", [1.5, "1", True], "invalid_type"),
    *wrong(49, "stream", ["yes", 1], "invalid_type"),
    Fields(49, {"stream_options": {"include_usage": True}}, bad("invalid_value", "stream_options")),
    Fields(49, {"stream": False, "stream_options": {}}, bad("invalid_value", "stream_options")),
    Fields(
        49,
        {"stream": True, "stream_options": {"foo": 1}},
        bad("unknown_parameter", "stream_options.foo"),
    ),
    *wrong(50, "user", ["x" * 10_000, "x" * 513], "string_above_max_length"),
    *wrong(50, "user", [5, True, ["x"]], "invalid_type"),
    *values(50, "user", ["x" * 512], OK),
]

CASES: list[Case] = sorted(
    [*PARSING, *HTTP, *MODEL, *PROMPT, *SAMPLING, *BEHAVIOURS], key=lambda case: case.row
)
