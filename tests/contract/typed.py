"""Answers read by the types of the official client, strictly, with every warning an error."""

import json
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import httpx
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WHOLE: dict[str, type[BaseModel]] = {COMPLETIONS: Completion, CHAT: ChatCompletion}


def parse(kind: type[M], body: dict[str, Any]) -> M:
    """Neither reading nor writing it again meets a value that the types do not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = kind.model_validate_json(json.dumps(body), strict=True)
        parsed.model_dump_json(warnings="error")
    return parsed


def parse_chunk(route: str, chunk: dict[str, Any]) -> None:
    """The client reads the chunks of a completion as whole ones, whose type knows no open end."""
    if route == CHAT:
        parse(ChatCompletionChunk, chunk)
        return
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    parse(Completion, chunk | {"choices": choices})


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a complete stream that has been read."""
    parts = response.content.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], parts[-2:]
    for part in parts[:-2]:
        assert part.startswith("data: "), part
        yield json.loads(part.removeprefix("data: "))
