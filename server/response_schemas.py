"""What a client is answered, as `/openapi.json` shows it.

Generations are written without these models, for speed; tests hold them to it.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from server.logprobs import Origin

FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Answer):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "overloaded_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Every error, and the last event but one of a stream that failed."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    """`cached_tokens` of the prompts did not have to be computed; they are among `prompt_tokens`."""

    cached_tokens: int


class Usage(Answer):
    """Of the whole response, or with `continuous_usage_stats` so far, then without the details."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class SpeculativeDecoding(Answer):
    """Counts over all choices, named as in vLLM; the per-step arrays with `metrics: "detailed"` only."""

    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    accepted_tokens_per_step: list[int] = []
    draft_tokens_per_step: list[int] = []
    num_draft_nodes: list[int] = []
    preset_per_step: list[str] = []


class RequestMetrics(Answer):
    """Of the whole response; times in milliseconds, null where nothing was measured."""

    queue_time_ms: float | None
    time_to_first_token_ms: float | None
    generation_time_ms: float | None
    tokens_per_second: float | None
    speculative_decoding: SpeculativeDecoding | None
    target_logprob_mean: float | None
    energy: dict[str, Any] | None
    speculative: dict[str, Any]
    seed: int


class CompletionLogProbs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    origins: list[Origin] = []  # as `origin` in chat, with `metrics: "detailed"` only


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogProbs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Generated(Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Generated):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    metrics: RequestMetrics


class CompletionChunk(Generated):
    """One `data:` event of a stream; `usage` and `metrics` on the last one, when it was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class TokenLogProb(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenLogProb):
    top_logprobs: list[TokenLogProb]
    origin: Origin | None = None


class ChatLogProbs(Answer):
    content: list[ScoredToken]
    refusal: None


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class AssistantDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatChunkChoice(Answer):
    index: int
    delta: AssistantDelta
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatCompletion(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics


class ChatCompletionChunk(Generated):
    """One `data:` event of a stream; `usage` and `metrics` on the last one, when it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Text(Answer):
    prompt: str


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    role: Literal["target", "draft"]
    max_model_len: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Status(Answer):
    status: Literal["ok", "ready"]


class Version(Answer):
    version: str
