"""`/openapi.json`: what FastAPI cannot know of handlers that read bytes and write their own answers."""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.auth import OPEN_PATHS
from server.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from server.config import ServerConfig
from server.response_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ErrorBody,
    Text,
    Tokens,
)
from server.schemas import MAX_BIASES, CompletionRequest
from server.validation import CHAT_REFUSALS, COMPLETION_REFUSALS, MESSAGE_REFUSALS, PART_REFUSALS, Refusals

REF = "#/components/schemas/{model}"
REQUESTS = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
ANSWERS = (Completion, CompletionChunk, ChatCompletion, ChatCompletionChunk, Tokens, Text, ErrorBody)
GENERATED = {
    "/v1/completions": (Completion, CompletionChunk),
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
}
WRITTEN: dict[str, type[BaseModel]] = {"/tokenize": Tokens, "/detokenize": Text}

ERRORS = {
    400: "The request is not valid: `param` names the field, the message the cure.",
    401: "The key is missing or not known.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not uncompressed JSON.",
    429: "More requests per minute than this key, or address, may send.",
    431: "The headers are too large.",
    500: "The request failed; the server's log has the details.",
    503: "The request cannot be taken now: the code says why.",
}
WITH_BODY = (404, 408, 413, 415, 503)
WITHOUT_BODY = {"/v1/models/{model_id}": (404,), "/ready": (503,)}
NOT_SERVED = "Known, and not served: only what asks for nothing is taken."

# A stream as its reader sees it, event by event.
EVENT: dict[str, Any] = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


def document(app: FastAPI, config: ServerConfig) -> None:
    """Let `app.openapi` describe bodies, answers, errors and keys as this server has them."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate(), config)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(described: dict[str, Any], config: ServerConfig) -> None:
    """Changes in place the document that FastAPI keeps."""
    components = described["components"]
    components["schemas"] |= _schemas(config)
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    if config.key_digests:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in described["paths"].items():
        for operation in operations.values():
            _complete_operation(path, operation, config)


def _complete_operation(path: str, operation: dict[str, Any], config: ServerConfig) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    if path in GENERATED:
        whole, chunk = GENERATED[path]
        stream = f"Events `data: {chunk.__name__}`, then `data: [DONE]`; comment lines begin with a colon."
        answers["200"]["content"] = {
            "application/json": {"schema": _ref(whole)},
            "text/event-stream": {"schema": EVENT | {"description": stream}},
        }
    elif path in WRITTEN:
        answers["200"]["content"] = {"application/json": {"schema": _ref(WRITTEN[path])}}
    elif path == "/metrics":
        answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    locked = path not in OPEN_PATHS
    if locked and config.key_digests:
        operation["security"] = [{"key": []}]
    for status in sorted(_statuses(path, operation, config, locked=locked)):
        content = {"application/json": {"schema": _ref(ErrorBody)}}
        answers[str(status)] = {"description": ERRORS[status], "content": content}


def _statuses(path: str, operation: dict[str, Any], config: ServerConfig, *, locked: bool) -> Iterable[int]:
    yield from (400, 431, 500)
    yield from WITH_BODY if "requestBody" in operation else WITHOUT_BODY.get(path, ())
    if locked and config.key_digests:
        yield 401
    if locked and config.requests_per_minute is not None:
        yield 429


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


def _schemas(config: ServerConfig) -> dict[str, Any]:
    """Of requests and answers, with the bounds that this configuration sets."""
    _, asked = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=REF)
    _, told = models_json_schema([(model, "serialization") for model in ANSWERS], ref_template=REF)
    schemas: dict[str, Any] = asked["$defs"]
    ids = [config.target_id, *config.target_aliases, *filter(None, [config.draft_id])]
    for model in REQUESTS:
        _property(schemas, model, "model")["enum"] = ids
    for model in (CompletionRequest, ChatRequest):
        _property(schemas, model, "logit_bias").update(maxProperties=MAX_BIASES, additionalProperties=False)
    _property(schemas, CompletionRequest, "logprobs")["maximum"] = config.max_logprobs
    speculative = schemas["SpeculativeOptions"]["properties"]
    for name in ("beam_width", "num_speculative_tokens"):
        speculative[name]["anyOf"][0]["maximum"] = getattr(config, f"max_{name}")
    _refuse(schemas["CompletionRequest"], COMPLETION_REFUSALS)
    _refuse(schemas["ChatRequest"], CHAT_REFUSALS)
    _refuse(schemas["ChatMessage"], MESSAGE_REFUSALS)
    _refuse(schemas["ContentPart"], PART_REFUSALS)
    schemas["ChatMessage"]["properties"]["role"]["enum"] = ["system", "developer", "user", "assistant"]
    schemas["ContentPart"]["properties"] |= {"type": {"const": "text"}, "text": {"type": "string"}}
    schemas["ContentPart"]["required"] = ["type", "text"]
    schemas |= told["$defs"]
    return schemas


def _property(schemas: dict[str, Any], model: type[BaseModel], name: str) -> dict[str, Any]:
    """The schema of a field's values other than null."""
    schema: dict[str, Any] = schemas[model.__name__]["properties"][name]
    first: dict[str, Any] = schema.get("anyOf", [schema])[0]
    return first


def _refuse(schema: dict[str, Any], refusals: Refusals) -> None:
    for name, neutral in refusals.items():
        schema["properties"][name] = {"enum": [None, *neutral], "description": NOT_SERVED}
