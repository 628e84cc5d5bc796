"""The typed frames between the API process and a worker.

A frame is a 4-byte big-endian length (at most `MAX_FRAME_BYTES`), one version byte and a msgpack map
whose `type` names one of the structs below. Commands go to the worker, events come back:

    LoadCommand -> LoadingEvent*, then ReadyEvent or FatalEvent
    GenerateCommand -> StepEvent*, then exactly one FinishedEvent or FailedEvent
    CancelCommand, FinishCommand -> the FinishedEvent of the command they name
    StopCommand -> end of file

Whatever is not such a frame raises `BadFrameError`, which ends the link it came from and nothing else.
"""

from typing import Any, Generic, TypeVar

import msgspec

from decoding import DecodingConfig, FinishReason, SamplingParams

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
HEADER_BYTES = 4


class BadFrameError(Exception):
    """The other end sent something that is no frame of this protocol version."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all commands and events; the class name is the tag."""


class LoadCommand(Message, frozen=True, kw_only=True):
    """The pair to load; `target` None means the embedded pair. `worker` counts from 0.

    `decoding` is how sequences are decoded that say nothing: adaptive, in steps of at most that shape.
    """

    target: str | None
    draft: str | None
    device: str
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    enable_prefix_caching: bool = True
    worker: int = 0
    num_workers: int = 1
    tensor_parallel_size: int = 1
    energy_source: str = "none"
    enforce_eager: bool = False
    decoding: DecodingConfig = DecodingConfig(method="target")


class GenerateCommand(Message, frozen=True, kw_only=True):
    """One prompt, `n` choices, the first of which is number `choice_offset` in the response.

    `confirm_end` says that the caller may cut the text (stop strings): every choice then ends with
    the caller's `FinishCommand`, so that no token behind the cut is ever counted. Commands of another
    `cache_salt` share no columns of the caches with it.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    config: DecodingConfig
    n: int = 1
    choice_offset: int = 0
    confirm_end: bool = False
    cache_salt: str = ""


class CancelCommand(Message, frozen=True, kw_only=True):
    id: str


class FinishCommand(Message, frozen=True, kw_only=True):
    """`choice` ends after its first `num_tokens` tokens; later ones were never asked for."""

    id: str
    choice: int
    num_tokens: int


class StopCommand(Message, frozen=True, kw_only=True):
    pass


TopLogProbs = list[tuple[int, float]]  # token ids with their log-probabilities in nats, best first


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one prompt token, and the likeliest tokens at its place."""

    log_prob: float
    top: TopLogProbs


class LoadingEvent(Message, frozen=True, kw_only=True):
    stage: str


class ReadyEvent(Message, frozen=True, kw_only=True):
    """What the API process must know of the loaded pair.

    `load_seconds` are the whole pair's, `role_load_seconds` those of each model's weights.
    `chat_template` is the target's own, as text, and `special_tokens` are the names it may use.
    `energy_source` is None where no energy is measured.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    tokenizer_file: str
    has_draft: bool
    description: str
    device: str
    memory_bytes: int
    load_seconds: float
    role_load_seconds: dict[str, float] = {}
    chat_template: str | None = None
    special_tokens: dict[str, str] = {}
    energy_source: str | None = None


class FatalEvent(Message, frozen=True, kw_only=True):
    """The pair cannot be served; `message` is one line, `exit_code` the server's."""

    message: str
    exit_code: int


class StepEvent(Message, frozen=True, kw_only=True):
    """Tokens of one choice since its last event: of one step, or of several when the reader lags.

    `draft_positions` are the places in `token_ids` of tokens that the draft proposed. `top_log_probs`
    has an entry per token where they were asked for; `prompt_log_probs`, of the prompt from its second
    token on, come with the first event of a choice that asked for them.
    """

    id: str
    choice: int
    token_ids: list[int]
    log_probs: list[float]
    draft_positions: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    top_log_probs: list[TopLogProbs] | None = None
    prompt_log_probs: list[TokenScore] | None = None


class SpeculationStep(msgspec.Struct, frozen=True, array_like=True):
    """One draft-and-verify step of one sequence, and the name of its shape."""

    num_draft_tokens: int
    num_accepted_tokens: int
    num_draft_nodes: int
    preset: str = ""


class EnergyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What one command used of which `devices`.

    `resolution_limited` says that it was too short for what the counter can tell; both are None where
    it ended before the counter moved at all.
    """

    source: str
    devices: list[str]
    prefill_microjoules: int | None
    decode_microjoules: int | None
    resolution_limited: bool


class GenerationStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one command over its choices; `log_prob_sum` in nats, `queue_seconds` of the first.
    `presets` counts steps by their shape.

    `cached_tokens` are those of the prompt that no choice had to run. `energy` is None where it was not
    measured.
    """

    prompt_tokens: int
    completion_tokens: int
    num_steps: int
    log_prob_sum: float
    queue_seconds: float
    speculation: list[SpeculationStep]
    presets: dict[str, int] = {}
    energy: EnergyUsage | None = None
    cached_tokens: int = 0


class FinishedEvent(Message, frozen=True, kw_only=True):
    """The end of a command: how each choice ended, and what was delivered."""

    id: str
    finish_reasons: list[FinishReason]
    stats: GenerationStats


class FailedEvent(Message, frozen=True, kw_only=True):
    """The end of a command that could not be served; `message` is for the log, `code` for the client."""

    id: str
    code: str
    message: str


class ForwardStats(msgspec.Struct, frozen=True, array_like=True):
    """Passes of one model in one phase of a step, in the device's seconds."""

    role: str
    phase: str
    method: str
    num_passes: int
    seconds: float


class StepStatsEvent(Message, frozen=True, kw_only=True):
    """One engine step, or with `method` None the state after commands or a step that raised.

    `out_of_memory` says that it raised because the device had no memory left.
    """

    method: str | None
    preset: str | None = None
    num_sequences: int
    num_tree_nodes: int
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float
    num_running: int
    num_waiting: int
    cache_usage: dict[str, float]
    draft_enabled: bool = True
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    out_of_memory: bool = False
    forward: list[ForwardStats] = []


class EnergyEvent(Message, frozen=True, kw_only=True):
    """Microjoules counted since the last such event: `raw` and `idle` by device, what is left of it
    `attributed` by method and phase; `seconds` is the time it took. `available` is false while the
    source cannot be read.
    """

    source: str
    available: bool
    seconds: float
    raw: dict[str, int]
    idle: dict[str, int]
    attributed: list[tuple[str, str, int]]


Command = LoadCommand | GenerateCommand | CancelCommand | FinishCommand | StopCommand
Event = (
    LoadingEvent
    | ReadyEvent
    | FatalEvent
    | StepEvent
    | FinishedEvent
    | FailedEvent
    | StepStatsEvent
    | EnergyEvent
)

M = TypeVar("M")


def encode_frame(message: Command | Event) -> bytes:
    """Raises ValueError when the message does not fit a frame."""
    body = msgspec.msgpack.encode(message)
    length = len(body) + 1
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a {type(message).__name__} of {length} bytes does not fit a frame")
    return length.to_bytes(HEADER_BYTES, "big") + bytes([PROTOCOL_VERSION]) + body


class FrameDecoder(Generic[M]):
    """Decodes the body of frames whose messages are of one union; raises BadFrameError."""

    def __init__(self, messages: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(messages)

    def decode(self, payload: bytes) -> M:
        if not payload or payload[0] != PROTOCOL_VERSION:
            raise BadFrameError("the frame is of another protocol version")
        try:
            return self._decoder.decode(memoryview(payload)[1:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrameError(f"the frame holds no message: {error}") from error


def frame_length(header: bytes) -> int:
    length = int.from_bytes(header, "big")
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise BadFrameError(f"a frame of {length} bytes")
    return length
