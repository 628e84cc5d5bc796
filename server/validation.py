"""From the bytes of a body to a request, or to the one error that names its first mistake."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server import schemas
from server.chat_schemas import ChatMessage, ChatRequest
from server.errors import InvalidRequestError
from server.schemas import MAX_BIASES, MAX_CHOICES, CompletionRequest, GenerationRequest

UNION_TAGS = frozenset({"text", "texts", "tokens", "token_lists", "off", "options"})
LIST_FIELDS = frozenset(
    {"prompt", "stop", "stop_token_ids", "logit_bias", "messages", "tokens"}
    | {"speculative.candidates_per_level"}
)
MAX_NAME = 64
# What a body may hold: a conversation of 2048 messages has 6,146 arrays and objects at most.
MAX_CONTAINERS = 8192
MAX_MEMBERS = 65_536
MAX_STRINGS = 131_072

NOT_PARSED = "We could not parse the JSON body of your request: "
NOT_JSON = f"{NOT_PARSED}send one JSON object in UTF-8 without NaN, Infinity or lone surrogates."
TOO_MANY_PARTS = (
    f"{NOT_PARSED}it may hold at most {MAX_CONTAINERS} arrays and objects, {MAX_MEMBERS} fields of objects "
    f"and {MAX_STRINGS} strings."
)

EXPECTED_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}

EXPECTED_SHAPES = {
    "prompt": "a string, an array of strings, an array of token ids, or an array of arrays of token ids",
    "stop": "a string or an array of strings",
    "logit_bias": "an object of numbers by token id",
    "messages": "an array of objects with 'role' and 'content', a string or an array of text parts",
    "speculative": "false or an object",
}

RAISED_BOUNDS = {"greater_than_equal": "at least {ge}", "greater_than": "greater than {gt}"}
LOWERED_BOUNDS = {"less_than_equal": "at most {le}", "less_than": "less than {lt}"}

Refusals = Mapping[str, tuple[Any, ...]]

# Known fields that this server does not serve, with the values that ask for nothing.
COMPLETION_REFUSALS: Refusals = {"suffix": ()}
CHAT_REFUSALS: Refusals = {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
PART_REFUSALS: Refusals = {"image_url": (), "input_audio": (), "file": (), "refusal": ()}
MESSAGE_REFUSALS: Refusals = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
}

M = TypeVar("M", bound=BaseModel)


def parse(kind: type[M], body: bytes) -> M:
    """Raises InvalidRequestError."""
    _check_size(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise describe(error.errors(include_url=False, include_input=False)[0]) from None


def _check_size(body: bytes) -> None:
    """Raises InvalidRequestError where a Python object for each part would hold up the event loop.

    What is counted at first may be inside strings: only when it is too much, strings are left out.
    """
    few_strings = body.count(b'"') <= 2 * MAX_STRINGS
    if few_strings and _is_small(body):
        return
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    few_strings = unescaped.count(b'"') <= 2 * MAX_STRINGS
    if not (few_strings and _is_small(b"".join(unescaped.split(b'"')[::2]))):
        raise InvalidRequestError(TOO_MANY_PARTS, code=None)


def _is_small(text: bytes) -> bool:
    return text.count(b"[") + text.count(b"{") <= MAX_CONTAINERS and text.count(b":") <= MAX_MEMBERS


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises InvalidRequestError."""
    request = parse(CompletionRequest, body)
    _refuse(request, COMPLETION_REFUSALS)
    _check_stream_options(request)
    _check_best_of(request)
    if request.num_candidates * len(request.prompts) > MAX_CHOICES:
        param = "n" if request.best_of is None else "best_of"
        message = f"'{param}' times the number of prompts must be at most {MAX_CHOICES}: send fewer at once."
        raise InvalidRequestError(message, code="invalid_value", param=param)
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """Raises InvalidRequestError."""
    request = parse(ChatRequest, body)
    _refuse(request, CHAT_REFUSALS)
    check_messages(request.messages)
    _check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        message = "'top_logprobs' needs 'logprobs': true: set it, or remove 'top_logprobs'."
        raise InvalidRequestError(message, code="invalid_value", param="top_logprobs")
    return request


def check_messages(messages: list[ChatMessage]) -> None:
    """Text only: raises InvalidRequestError for what else OpenAI's messages may hold."""
    for message in messages:
        _refuse(message, MESSAGE_REFUSALS, "messages")
        if message.role in ("tool", "function"):
            raise unsupported("messages", "remove the messages of tools")
        parts = message.content if isinstance(message.content, list) else []
        for part in parts:
            _refuse(part, PART_REFUSALS, "messages")
            if part.type != "text":
                raise unsupported("messages", "send parts of the type 'text' only")
            if part.text is None:
                reason = "'messages' holds a part without 'text': give it one."
                raise InvalidRequestError(reason, code="invalid_value", param="messages")


def describe(error: ErrorDetails) -> InvalidRequestError:
    """The answer to pydantic's first error."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return InvalidRequestError(NOT_JSON, code=None)
    location = error["loc"]
    if kind == schemas.UNKNOWN_FIELD:
        location = (*location, context["name"])
    param = param_of(location)
    if param is None:
        return InvalidRequestError("The body must be a JSON object.", code="invalid_type")
    code, rule = _code_and_rule(kind, context, param, integer=isinstance(_bound(context), int))
    return InvalidRequestError(f"'{param}' {rule}.", code=code, param=param)


def param_of(location: tuple[int | str, ...]) -> str | None:
    """The dotted path of the field, None for the whole body."""
    parts = [part for part in location[:1] if isinstance(part, str)]
    names = parts + [part for part in location[1:] if isinstance(part, str) and part not in UNION_TAGS]
    if not names:
        return None
    if names[0] in LIST_FIELDS:
        return names[0]
    return ".".join("".join(c for c in name[:MAX_NAME] if c.isprintable()) for name in names[:2])


def _bound(context: dict[str, Any]) -> Any:
    return next((context[key] for key in ("ge", "gt", "le", "lt") if key in context), None)


def _code_and_rule(kind: str, context: dict[str, Any], param: str, *, integer: bool) -> tuple[str, str]:
    number = "integer" if integer else "decimal"
    # An element is not the field: its bounds are a matter of the field's value.
    element = param in LIST_FIELDS
    if kind in RAISED_BOUNDS:
        code = "invalid_value" if element else f"{number}_below_min_value"
        return code, _bound_rule(RAISED_BOUNDS[kind].format(**context), element)
    if kind in LOWERED_BOUNDS:
        code = "invalid_value" if element else f"{number}_above_max_value"
        return code, _bound_rule(LOWERED_BOUNDS[kind].format(**context), element)
    if kind in EXPECTED_TYPES:
        return "invalid_type", _type_rule(kind, param)
    return _other_rule(kind, context, param)


def _bound_rule(bound: str, element: bool) -> str:
    return f"holds a number that must be {bound}" if element else f"must be {bound}"


def _type_rule(kind: str, param: str) -> str:
    return f"must be {EXPECTED_SHAPES.get(param, EXPECTED_TYPES[kind])}"


def _other_rule(kind: str, context: dict[str, Any], param: str) -> tuple[str, str]:
    expected = EXPECTED_SHAPES.get(param)
    match kind:
        case "missing" if param == "model":
            return "missing_required_parameter", "is required: send the id of a model listed by /v1/models"
        case "missing" if expected:
            return "missing_required_parameter", f"is required, and must be {expected}"
        case "missing":
            return "missing_required_parameter", "is required"
        case schemas.UNKNOWN_FIELD:
            return "unknown_parameter", "is not a parameter of this endpoint: remove it"
        case "union_tag_invalid" | "union_tag_not_found":
            return "invalid_type", f"must be {expected}"
        case "literal_error" if param == "speculative":
            return "invalid_type", f"must be {expected}"
        case "literal_error":
            return "invalid_value", f"must be one of {context['expected']}"
        case "too_many_biases":
            return "invalid_value", f"must have at most {MAX_BIASES} entries"
        case "string_pattern_mismatch":
            return "invalid_value", "must name its token ids as plain decimal numbers"
        case "too_short":
            return "empty_array", "must not be an empty array, nor hold one"
        case "too_long":
            return "array_above_max_length", f"must have at most {context['max_length']} elements"
        case "string_too_long":
            limit = context["max_length"]
            return "string_above_max_length", f"must have at most {limit} characters, each string of it"
        case "string_too_short":
            return "invalid_value", "must not be an empty string, nor hold one"
    return "invalid_value", "has a value that is not allowed"


def unsupported(param: str, cure: str = "remove it") -> InvalidRequestError:
    message = f"'{param}' is not supported by this server yet: {cure}."
    return InvalidRequestError(message, code="unsupported_parameter", param=param)


def _refuse(model: BaseModel, refusals: Refusals, param: str | None = None) -> None:
    """Nothing is accepted and then ignored."""
    for name, neutral in refusals.items():
        value = getattr(model, name)
        if value is not None and value not in neutral:
            raise unsupported(param or name, f"remove '{name}'")


def _check_stream_options(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        message = "'stream_options' needs 'stream': true: set it, or remove 'stream_options'."
        raise InvalidRequestError(message, code="invalid_value", param="stream_options")


def _check_best_of(request: CompletionRequest) -> None:
    best_of = request.best_of or request.num_choices
    if best_of < request.num_choices:
        message = "'best_of' must be at least 'n': raise it, or remove it."
        raise InvalidRequestError(message, code="invalid_value", param="best_of")
    if request.stream and (request.best_of or 1) > 1:
        message = "'best_of' is not streamed: the choices are ranked at their end. Remove 'stream' or it."
        raise InvalidRequestError(message, code="invalid_value", param="best_of")
