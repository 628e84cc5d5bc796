"""What schemathesis asks beyond its own checks, and what keeps its requests small; it loads this itself."""

import json
from typing import Any

import schemathesis

KEYS = {"message", "type", "param", "code"}
TYPES = {"invalid_request_error", "rate_limit_error", "overloaded_error", "server_error"}
MOST_CHARACTERS = 256
LIMITS = ("max_tokens", "max_completion_tokens")
# The most that is asked for, where the document allows more; beyond that a value stays wrong.
SMALL = {
    "max_tokens": (8, 2**31 - 1),
    "max_completion_tokens": (8, 2**31 - 1),
    "n": (4, 128),
    "best_of": (4, 20),
}


@schemathesis.check
def errors_are_openais(ctx: schemathesis.CheckContext, response: Any, case: schemathesis.Case) -> None:
    """Every answer that is no success has the error object, and is short."""
    if response.status_code < 400:
        return
    check_openai_error(response.content)


def check_openai_error(content: bytes) -> None:
    body = json.loads(content)
    assert set(body) == {"error"}, body
    assert set(body["error"]) == KEYS, body
    assert isinstance(body["error"]["message"], str), body
    assert body["error"]["type"] in TYPES, body
    assert all(body["error"][key] is None or isinstance(body["error"][key], str) for key in ("param", "code"))
    assert len(content) <= 2048


@schemathesis.hook
def before_call(ctx: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Asks for the model that is there, and for no more of it than a test has time for."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and 1 <= len(body["model"]) <= MOST_CHARACTERS:
        body["model"] = "tiny"
    if case.path == "/v1/chat/completions" and all(body.get(name) is None for name in LIMITS):
        body["max_tokens"] = 8  # else the answer may fill the context
    for name, (most, bound) in SMALL.items():
        if isinstance(body.get(name), int) and most < body[name] <= bound:
            body[name] = most
