"""What a client may send to `/v1/chat/completions`, `/tokenize` and `/detokenize`.

Fields of OpenAI's that are not served are known here, so that they are refused by name
(`server.validation`) and not as unknown ones.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.schemas import MAX_INTEGER, GenerationRequest, StrictModel, TokenId

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_TOP_LOG_PROBS = 20

ModelName = Annotated[str, Field(min_length=1, max_length=256)]


def _content_shape(value: Any) -> str:
    return "text" if isinstance(value, str) else "texts" if isinstance(value, list) else "none"


class ContentPart(StrictModel):
    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


Parts = Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class ChatMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[Parts, Tag("texts")],
        Discriminator(_content_shape),
    ]
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    refusal: Any = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def conversation(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """As chat templates know it: `developer` is OpenAI's newer name of `system`."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        | ({} if message.name is None else {"name": message.name})
        for message in messages
    ]


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOG_PROBS)] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    @property
    def num_top_log_probs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(StrictModel):
    """The body of `POST /tokenize`, vLLM's: a text or a conversation."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictModel):
    """The body of `POST /detokenize`, vLLM's."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
