"""What a client may send: strict types, bounds on everything; chat's own fields are in `server.chat_schemas`.

`server.validation` turns the body's bytes into one of these, or raises the one error that names its
first mistake. What needs the loaded model (vocabulary, context, ids of models) is checked in
`server.admission`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 64
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 300
MAX_INTEGER = 2**31 - 1
UNKNOWN_FIELD = "unknown_field"  # the type of the error that names one

TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _prompt_shape(value: Any) -> str:
    """Decided by the first element, so that one mistake gives one message."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return "none"
    first = value[0] if value else 0
    return "texts" if isinstance(first, str) else "token_lists" if isinstance(first, list) else "tokens"


def _stop_shape(value: Any) -> str:
    return "text" if isinstance(value, str) else "texts" if isinstance(value, list) else "none"


def _speculative_shape(value: Any) -> str:
    return "off" if isinstance(value, bool) else "options"


def _few_biases(value: Any) -> Any:
    """Before the entries are looked at, so that a huge object is one quick error."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError("too_many_biases", "too many")
    return value


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[
        list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("token_lists")
    ],
    Discriminator(_prompt_shape),
]

StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("texts")],
    Discriminator(_stop_shape),
]

DecimalTokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
LogitBias = Annotated[
    dict[DecimalTokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)
]
Level = Annotated[int, Field(ge=1, le=16)]


class StrictModel(BaseModel):
    """Only known fields, of exactly their types."""

    # pydantic's own "forbid" writes an error per unknown field: 90,000 of them held the event loop 0.5 s.
    model_config = ConfigDict(
        strict=True,
        extra="allow",
        allow_inf_nan=False,
        frozen=True,
        json_schema_extra={"additionalProperties": False},
    )

    @model_validator(mode="after")
    def _knows_its_fields(self) -> Self:
        if self.model_extra:
            raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", {"name": next(iter(self.model_extra))})
        return self


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SpeculativeOptions(StrictModel):
    """How this request is decoded; omitted and null keys take the server's values."""

    method: Literal[
        "target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad"
    ] | None = None  # fmt: skip
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    beam_width: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    acceptance_threshold: Annotated[float, Field(ge=0, le=1e6)] | None = None
    acceptance_reference: Literal["draft", "target"] | None = None
    acceptance: Literal["token", "block"] | None = None
    candidates_per_level: (
        Annotated[list[Level], Field(min_length=1, max_length=16, fail_fast=True)] | None
    ) = None
    metrics: Literal["none", "summary", "detailed"] | None = None


Speculative = Annotated[
    Annotated[Literal[False], Tag("off")] | Annotated[SpeculativeOptions, Tag("options")],
    Discriminator(_speculative_shape),
]


class GenerationRequest(StrictModel):
    """What completions and chat have in common; null means the default throughout."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = (
        None
    )
    include_stop_str_in_output: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    speculative: Speculative | None = None

    @property
    def num_choices(self) -> int:
        """Choices per prompt in the response."""
        return 1 if self.n is None else self.n

    @property
    def num_candidates(self) -> int:
        """Choices per prompt that are decoded."""
        return self.num_choices

    @property
    def num_top_log_probs(self) -> int | None:
        """How many likeliest tokens are shown beside each token, None without log-probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        return False

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items())

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def options(self) -> SpeculativeOptions:
        """The speculative keys that were sent; `false` is the method `target`."""
        if self.speculative is False:
            return SpeculativeOptions(method="target")
        return self.speculative or SpeculativeOptions()


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: Prompt | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: str | None = None  # known, and refused by name

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices

    @property
    def num_top_log_probs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one by one; an omitted one is the empty text."""
        if self.prompt is None:
            return [""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
