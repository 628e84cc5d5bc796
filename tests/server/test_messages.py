"""Frames: what is sent arrives, and whatever else comes is a BadFrameError."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import DecodingConfig, FinishReason, SamplingParams
from server.messages import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    BadFrameError,
    CancelCommand,
    Command,
    Event,
    FailedEvent,
    FatalEvent,
    FinishCommand,
    FinishedEvent,
    FrameDecoder,
    GenerateCommand,
    GenerationStats,
    LoadCommand,
    LoadingEvent,
    SpeculationStep,
    StepEvent,
    StepStatsEvent,
    StopCommand,
    TokenScore,
    encode_frame,
    frame_length,
)
from tests.server.fakes import ready_event

GENERATE = GenerateCommand(
    id="a",
    prompt_ids=[1, 2, 2**31 - 1],
    n=3,
    choice_offset=6,
    params=SamplingParams(
        max_tokens=5,
        temperature=0.0,
        seed=-(2**63),
        stop_token_ids=(3, 4),
        ignore_eos=True,
        logit_bias=((1, -5.0),),
    ),
    config=DecodingConfig(method="mtad", acceptance_threshold=0.25, candidates_per_level=(2, 3)),
    confirm_end=True,
)
COMMANDS: list[Command] = [
    LoadCommand(target=None, draft=None, device="cpu", dtype="auto", max_model_len=None, max_num_seqs=2),
    GENERATE,
    CancelCommand(id="a"),
    FinishCommand(id="a", choice=2, num_tokens=0),
    StopCommand(),
]
STATS = GenerationStats(
    prompt_tokens=1,
    completion_tokens=2,
    num_steps=1,
    log_prob_sum=float("-inf"),
    queue_seconds=0.5,
    speculation=[SpeculationStep(4, 2, 16)],
)
EVENTS: list[Event] = [
    LoadingEvent(stage="models"),
    ready_event("tokenizer.json"),
    FatalEvent(message="no such model", exit_code=2),
    StepEvent(
        id="a", choice=1, token_ids=[5], log_probs=[-0.1], finish_reason=FinishReason.STOP, stop_token_id=5
    ),
    StepEvent(
        id="a",
        choice=0,
        token_ids=[5],
        log_probs=[float("-inf")],
        top_log_probs=[[(5, -0.5), (6, float("-inf"))]],
        prompt_log_probs=[TokenScore(-1.0, [(1, -0.5)])],
    ),
    FinishedEvent(id="a", finish_reasons=[FinishReason.ABORT], stats=STATS),
    FailedEvent(id="a", code="worker_failed", message="x"),
    StepStatsEvent(
        method="mtad",
        num_sequences=1,
        num_tree_nodes=2,
        prefill_tokens=3,
        prefill_seconds=0.1,
        decode_seconds=0.2,
        num_running=4,
        num_waiting=5,
        cache_usage={"target": 0.5},
    ),
]
commands: FrameDecoder[Command] = FrameDecoder(Command)
replies: FrameDecoder[Event] = FrameDecoder(Event)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: type(each).__name__)
def test_commands_round_trip(command: Command) -> None:
    frame = encode_frame(command)
    assert frame_length(frame[:HEADER_BYTES]) == len(frame) - HEADER_BYTES
    assert commands.decode(frame[HEADER_BYTES:]) == command
    with pytest.raises(BadFrameError):
        replies.decode(frame[HEADER_BYTES:])


@pytest.mark.parametrize("event", EVENTS, ids=lambda each: type(each).__name__)
def test_events_round_trip(event: Event) -> None:
    frame = encode_frame(event)
    assert replies.decode(frame[HEADER_BYTES:]) == event
    with pytest.raises(BadFrameError):
        commands.decode(frame[HEADER_BYTES:])


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_random_bytes_are_bad_frames(payload: bytes) -> None:
    for decoder in (commands, replies):
        with pytest.raises(BadFrameError):
            decoder.decode(payload)
        with pytest.raises(BadFrameError):
            decoder.decode(bytes([PROTOCOL_VERSION]) + payload)


@settings(max_examples=500)
@given(st.sampled_from([GENERATE, *COMMANDS]), st.data())
def test_damaged_frames_decode_or_are_bad(command: Command, data: st.DataObject) -> None:
    """A flipped byte gives another valid command or a BadFrameError, and nothing else."""
    payload = bytearray(encode_frame(command)[HEADER_BYTES:])
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] = data.draw(st.integers(0, 255))
    try:
        decoded = commands.decode(bytes(payload))
    except BadFrameError:
        return
    assert isinstance(decoded, msgspec.Struct)


@settings(max_examples=100)
@given(st.sampled_from(EVENTS), st.data())
def test_truncated_frames_are_bad(event: Event, data: st.DataObject) -> None:
    payload = encode_frame(event)[HEADER_BYTES:]
    with pytest.raises(BadFrameError):
        replies.decode(payload[: data.draw(st.integers(0, len(payload) - 1))])


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_values_are_checked_again_at_the_other_end(value: float) -> None:
    """A sender that skipped its checks does not get past the receiver's."""
    fields = msgspec.to_builtins(GENERATE)
    fields["params"]["temperature"] = value
    payload = bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields)
    with pytest.raises(BadFrameError, match="temperature"):
        commands.decode(payload)


def test_unknown_fields_and_tags_are_bad() -> None:
    for fields in (
        {"type": "CancelCommand", "id": "a", "extra": 1},
        {"type": "Other", "id": "a"},
        {"id": "a"},
    ):
        with pytest.raises(BadFrameError):
            commands.decode(bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields))


def test_deep_nesting_is_bad() -> None:
    with pytest.raises(BadFrameError):
        commands.decode(bytes([PROTOCOL_VERSION]) + b"\x91" * 100_000)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_lengths_are_bounded(length: int) -> None:
    with pytest.raises(BadFrameError):
        frame_length(length.to_bytes(HEADER_BYTES, "big"))


def test_a_message_too_large_is_not_sent() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_frame(CancelCommand(id="x" * MAX_FRAME_BYTES))
