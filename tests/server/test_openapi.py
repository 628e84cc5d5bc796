"""The document says what the server does: fields, bounds, statuses, the shape of every answer."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from server import response_schemas as answers
from tests.server.conftest import Serve, Served

JSON = {"content-type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
DETAILED = {"metrics": "detailed", "method": "mmtad"}


async def document_of(served: Served, **headers: str) -> dict[str, Any]:
    response = await served.client.get("/openapi.json", headers=headers)
    document: dict[str, Any] = response.json()
    return document


async def test_every_reference_leads_somewhere(served: Served) -> None:
    document = await document_of(served)
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert {"CompletionRequest", "ChatRequest", "SpeculativeOptions", "ErrorBody"} <= references
    assert references <= set(schemas)
    assert "HTTPValidationError" not in schemas


async def test_errors_have_their_schema(served: Served) -> None:
    document = await document_of(served)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert {"200", "400", "431", "500"} <= statuses
            assert "422" not in statuses
            assert ({"408", "413", "415", "503"} <= statuses) == ("requestBody" in operation), path
            for status in statuses - {"200"}:
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


async def test_keys_and_rates_are_told(serve: Serve, served: Served) -> None:
    async with serve(api_key=["k"], requests_per_minute=9) as locked:
        document = await document_of(locked, authorization="Bearer k")
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path in ("/health", "/ready", "/metrics")
            assert ("security" in operation) != is_open
            assert ({"401", "429"} <= set(operation["responses"])) != is_open
    assert "securitySchemes" not in (await document_of(served))["components"]


async def test_bounds_are_the_configured_ones(serve: Serve) -> None:
    async with serve(max_beam_width=5, max_logprobs=7, served_model_name=["a", "b"]) as served:
        schemas = (await document_of(served))["components"]["schemas"]
    completion = schemas["CompletionRequest"]["properties"]
    assert completion["model"]["enum"] == ["a", "b", "tiny-draft"]
    assert completion["logprobs"]["anyOf"][0]["maximum"] == 7
    assert completion["suffix"]["enum"] == [None]
    assert schemas["ChatRequest"]["properties"]["tools"]["enum"] == [None, []]
    assert schemas["SpeculativeOptions"]["properties"]["beam_width"]["anyOf"][0]["maximum"] == 5
    assert not schemas["CompletionRequest"]["additionalProperties"]


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", {"model": "tiny"}, answers.Completion),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": "xy", "echo": True, "logprobs": 5, "n": 2, "speculative": DETAILED},
            answers.Completion,
        ),
        ("/v1/completions", {"model": "tiny", "speculative": False, "stop": "c"}, answers.Completion),
        ("/v1/chat/completions", CHAT, answers.ChatCompletion),
        (
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "speculative": DETAILED},
            answers.ChatCompletion,
        ),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3}, answers.ChatCompletion),
        ("/tokenize", {"prompt": "x"}, answers.Tokens),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, answers.Tokens),
        ("/detokenize", {"tokens": [1]}, answers.Text),
        ("/detokenize", {"tokens": ["x"]}, answers.ErrorBody),
        ("/v1/completions", {"model": "x"}, answers.ErrorBody),
        ("/v1/completions", [], answers.ErrorBody),
        ("/v1/models", None, answers.ModelList),
        ("/v1/models/tiny-draft", None, answers.Model),
    ],
    ids=str,
)
async def test_answers_are_as_described(served: Served, path: str, body: Any, model: type[BaseModel]) -> None:
    if body is None:
        response = await served.client.get(path)
    else:
        response = await served.client.post(path, json=body)
    model.model_validate_json(response.content, strict=True)
    document = await document_of(served)
    template = "/v1/models/{model_id}" if path.startswith("/v1/models/") else path
    (operation,) = document["paths"][template].values()
    described = operation["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
    assert described["$ref"].endswith(f"/{model.__name__}")


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", {"model": "tiny", "logprobs": 2}, answers.CompletionChunk),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}, answers.ChatCompletionChunk),
    ],
    ids=["completion", "chat"],
)
async def test_chunks_are_as_described(served: Served, path: str, body: Any, model: type[BaseModel]) -> None:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = await served.client.post(path, json=streamed)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    for event in events:
        model.model_validate_json(event, strict=True)
    assert set(json.loads(events[-1])["metrics"]) == set(answers.RequestMetrics.model_fields)


async def test_statuses_that_come_before_the_body_are_described(served: Served) -> None:
    document = await document_of(served)
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    for headers in ({}, {**JSON, "content-length": str(10**9)}, {**JSON, "x": "x" * 70_000}):
        response = await served.client.post("/v1/completions", content=b"{}", headers=headers)
        assert response.status_code in (413, 415, 431)
        assert str(response.status_code) in responses


async def test_a_proxy_path_is_the_documents_server(serve_port: Serve) -> None:
    async with serve_port(root_path="/llm") as served:
        assert (await document_of(served))["servers"] == [{"url": "/llm"}]
        assert "/llm/openapi.json" in (await served.client.get("/docs")).text
