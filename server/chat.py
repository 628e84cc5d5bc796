"""Conversations as the model's own chat template writes them, in jinja's sandbox.

The template comes with the model's files, never with a request.
"""

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import structlog
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import InvalidRequestError
from server.messages import ReadyEvent

REFUSED = (
    "'messages' cannot be written by the model's chat template: most take an optional system message, "
    "then user and assistant in turn."
)


log = structlog.get_logger("server.chat")


class ChatTemplate:
    """A compiled template; raises jinja2.TemplateError when it cannot be compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        # The settings and helpers are those that transformers gives to templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; raises InvalidRequestError where the template refuses it."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError):
            raise InvalidRequestError(REFUSED, code="invalid_value", param="messages") from None


def compile_template(model: ReadyEvent) -> ChatTemplate | None:
    """The model's template, None where it has none that can be used."""
    if model.chat_template is None:
        return None
    try:
        return ChatTemplate(model.chat_template, model.special_tokens)
    except TemplateError as error:
        log.error("chat_template_failed", reason=str(error))
        return None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return dt.datetime.now().astimezone().strftime(pattern)
