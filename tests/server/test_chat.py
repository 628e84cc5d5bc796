"""`/v1/chat/completions`, `/tokenize` and `/detokenize`: templates, shapes, what is refused."""

from typing import Any

import httpx
import msgspec
import pytest

from server.chat import ChatTemplate, compile_template
from server.errors import InvalidRequestError
from tests.server.conftest import Serve, Served
from tests.server.fakes import BOS, CONTEXT, EOS, ScriptedEngine, constant, ids_of, ready_event
from tests.server.test_bad_input import check_error
from tests.server.test_completions import METHODS, events, usage

HELLO = [{"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "yo", "refusal": None, "tool_calls": []}
HELLO_IDS = [*ids_of("u:hi"), EOS, *ids_of("a:")]


async def chat(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "temperature": 0, **fields}
    return await served.client.post("/v1/chat/completions", json=body)


async def test_response_has_every_field(served: Served) -> None:
    body = (await chat(served, max_tokens=3, seed=5)).json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == usage(7, 3)
    assert body["metrics"]["speculative"]["method"] == "mmtad"
    assert body["metrics"]["seed"] == 5
    assert served.engine.added[0].prompt_ids == HELLO_IDS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 3])
async def test_streamed_equals_whole(serve: Serve, method: str, n: int) -> None:
    engine = ScriptedEngine(script=constant("aö€🎉ñ z€"))
    async with serve(engine) as served:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        fields = {"n": n, "speculative": {"method": method}, "stop": "z", "logprobs": True, "top_logprobs": 2}
        whole = (await chat(served, **fields)).json()
        chunks = events(await chat(served, **fields, **options))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            first = choice["index"] not in choices
            entry = choices.setdefault(choice["index"], {"text": "", "entries": []})
            assert (choice["delta"].get("role") == "assistant") == first
            entry["text"] += choice["delta"].get("content", "")
            entry["entries"] += choice["logprobs"]["content"]
            entry["end"] = choice["finish_reason"], choice["stop_reason"]
    assert choices == {
        choice["index"]: {
            "text": choice["message"]["content"],
            "entries": choice["logprobs"]["content"],
            "end": (choice["finish_reason"], choice["stop_reason"]),
        }
        for choice in whole["choices"]
    }
    assert len(choices) == n
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["metrics"]["speculative"] == whole["metrics"]["speculative"]


async def test_log_probs_are_chat_shaped(serve: Serve) -> None:
    async with serve(ScriptedEngine(script=constant("é"))) as served:
        body = (await chat(served, max_tokens=1, logprobs=True, top_logprobs=1)).json()
    token = {"token": "bytes:\\xc3", "logprob": -0.5, "bytes": [0xC3]}
    assert body["choices"][0]["logprobs"] == {
        "content": [{**token, "top_logprobs": [token]}],
        "refusal": None,
    }


async def test_detailed_says_who_proposed_each_token(served: Served) -> None:
    fields = {"max_tokens": 4, "logprobs": True, "speculative": {"metrics": "detailed"}}
    (choice,) = (await chat(served, **fields)).json()["choices"]
    assert [each["origin"] for each in choice["logprobs"]["content"]] == [
        "draft",
        "draft",
        "target",
        "target",
    ]


async def test_the_answer_may_fill_the_context(served: Served) -> None:
    await chat(served)
    await chat(served, max_completion_tokens=5)
    await chat(served, max_completion_tokens=5, max_tokens=9)
    assert [each.params.max_tokens for each in served.engine.added] == [CONTEXT - len(HELLO_IDS), 5, 5]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "system", "content": "S"}, *HELLO], "s:S</s>u:hi</s>a:"),
        ([{"role": "developer", "content": "S"}, *HELLO], "s:S</s>u:hi</s>a:"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
            "u:hi</s>a:",
        ),
        (
            [*HELLO, {"role": "assistant", "content": "yo", "refusal": None, "tool_calls": []}],
            "u:hi</s>a:yo</s>a:",
        ),
        ([{"role": "user", "content": "{{ 1 + 1 }}", "name": "x"}], "u:{{ 1 + 1 }}</s>a:"),
    ],
)
async def test_templates_write_the_prompt(served: Served, messages: list[Any], text: str) -> None:
    assert (await chat(served, messages=messages, max_tokens=1)).status_code == 200
    assert served.engine.added[0].prompt_ids == served.pool.codec.tokenizer.encode(text).ids  # type: ignore[union-attr]


FIELD_ERRORS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "empty_array", "messages"),
    *(({"messages": bad}, "invalid_type", "messages") for bad in ("hi", {}, 5, None, ["hi"])),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages"),
    ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "invalid_type", "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "empty_array", "messages"),
    ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "unknown_parameter", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_value", "messages"),
    ({"messages": HELLO * 2049}, "array_above_max_length", "messages"),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "context_length_exceeded", "messages"),
    *(
        ({"messages": [{"role": "user", "content": [part]}]}, "unsupported_parameter", "messages")
        for part in (
            {"type": "image_url", "image_url": {"url": "http://x"}},
            {"type": "input_audio", "input_audio": {}},
            {"type": "file", "file": {}},
        )
    ),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "unsupported_parameter", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported_parameter", "messages"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "unsupported_parameter",
        "messages",
    ),
    *(
        ({name: value}, "unsupported_parameter", name)
        for name, value in (
            ("tools", [{}]),
            ("tool_choice", "auto"),
            ("functions", [{}]),
            ("response_format", {"type": "json_object"}),
            ("response_format", {"type": "json_schema", "json_schema": {}}),
            ("modalities", ["text", "audio"]),
            ("audio", {}),
            ("prediction", {}),
        )
    ),
    ({"chat_template": "{{ 1 }}"}, "unknown_parameter", "chat_template"),
    ({"chat_template_kwargs": {}}, "unknown_parameter", "chat_template_kwargs"),
    ({"prompt": "x"}, "unknown_parameter", "prompt"),
    ({"echo": True}, "unknown_parameter", "echo"),
    ({"best_of": 2}, "unknown_parameter", "best_of"),
    ({"logprobs": 1}, "invalid_type", "logprobs"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ({"max_completion_tokens": -1}, "integer_below_min_value", "max_completion_tokens"),
    ({"max_completion_tokens": 10**6}, "context_length_exceeded", "max_tokens"),
    ({"n": 129}, "integer_above_max_value", "n"),
    ({"temperature": 3}, "decimal_above_max_value", "temperature"),
    ({"speculative": {"beam_width": 17}}, "integer_above_max_value", "speculative.beam_width"),
    ({"stream_options": {}}, "invalid_value", "stream_options"),
]


@pytest.mark.parametrize(("fields", "code", "param"), FIELD_ERRORS)
async def test_field_errors(served: Served, fields: dict[str, Any], code: str, param: str) -> None:
    message = check_error(await chat(served, **fields), 400, code, param)
    assert "assistant first" not in message  # the template's own words may hold the input
    assert served.engine.added == []


async def test_neutral_values_ask_for_nothing(served: Served) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    assert (await chat(served, **neutral, audio=None, n=None)).status_code == 200


async def test_bodies_and_models(served: Served) -> None:
    check_error(await chat(served, model="nope"), 404, "model_not_found", "model")
    for path in ("/v1/chat/completions", "/tokenize", "/detokenize"):
        check_error(await served.client.post(path, content=b"{}"), 415, "unsupported_media_type", None)
        check_error(await served.client.get(path), 405, None, None)


async def test_the_draft_answers_alone(served: Served) -> None:
    assert (await chat(served, model="tiny-draft")).status_code == 200
    assert served.engine.added[0].config.method == "draft"


async def test_a_model_without_a_template(served: Served) -> None:
    served.pool.template = None
    check_error(await chat(served), 400, "unsupported_parameter", "messages")


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% endfor %}"])
def test_a_broken_template_is_none(source: str) -> None:
    assert compile_template(msgspec.structs.replace(ready_event(""), chat_template=source)) is None
    assert compile_template(msgspec.structs.replace(ready_event(""), chat_template=None)) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ none + 1 }}",
    ],
)
def test_templates_run_in_a_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_templates_see_nothing_of_their_helpers() -> None:
    template = ChatTemplate("{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}", {})
    assert template.render([{"role": "user", "content": "x"}]) == ""


def test_what_templates_may_use() -> None:
    source = (
        "{%- for m in messages -%}{%- if loop.index > 1 %}{% break %}{% endif -%}"
        "{{ m | tojson }}{{ bos_token }}{{ strftime_now('%Y')[:2] }}{%- endfor -%}"
    )
    text = ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "u", "content": "é<"}] * 2)
    assert text == '{"role": "u", "content": "é<"}<s>20'


async def tokens(served: Served, **body: Any) -> httpx.Response:
    return await served.client.post("/tokenize", json=body)


async def test_tokenize(served: Served) -> None:
    assert (await tokens(served, model="tiny", prompt="hé")).json() == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": ids_of("hé"),
        "token_strs": None,
    }
    body = (await tokens(served, prompt="hé", return_token_strs=True, add_special_tokens=False)).json()
    assert body["token_strs"] == ["h", "Ã", "©"]
    assert (await tokens(served, prompt="")).json()["tokens"] == []
    assert (await tokens(served, messages=HELLO)).json()["tokens"] == HELLO_IDS
    body = (await tokens(served, messages=HELLO, add_generation_prompt=False)).json()
    assert body["tokens"] == HELLO_IDS[:-2]


async def test_detokenize(served: Served) -> None:
    response = await served.client.post("/detokenize", json={"tokens": [BOS, *ids_of("hé")]})
    assert response.json() == {"prompt": "<s>hé"}
    empty = await served.client.post("/detokenize", json={"tokens": [], "model": "tiny-draft"})
    assert empty.json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "missing_required_parameter", "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "invalid_type", "prompt"),
        ("/tokenize", {"prompt": "x", "foo": 1}, "unknown_parameter", "foo"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "x"}]}, "unsupported_parameter", "messages"),
        ("/detokenize", {}, "missing_required_parameter", "tokens"),
        ("/detokenize", {"tokens": "x"}, "invalid_type", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [258]}, "invalid_value", "tokens"),
    ],
)
async def test_token_routes_refuse(served: Served, path: str, body: Any, code: str, param: str) -> None:
    check_error(await served.client.post(path, json=body), 400, code, param)
    unknown = {"prompt": "x"} if path == "/tokenize" else {"tokens": [1]}
    answer = await served.client.post(path, json={**unknown, "model": "nope"})
    check_error(answer, 404, "model_not_found", "model")
