"""A worker without models: the real engine loop, links and frames around a scripted engine."""

import asyncio
import math
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from decoding import FinishReason, ForwardTime, Retreat, Sequence, SequenceOutput, StepStats
from decoding.sequence import TokenLogProb, TopLogProbs
from server.link import Outbox
from server.loop import WorkerLoop
from server.messages import (
    HEADER_BYTES,
    Command,
    Event,
    FrameDecoder,
    LoadCommand,
    ReadyEvent,
    StopCommand,
    encode_frame,
    frame_length,
)
from server.turns import Turn

BOS, EOS = 256, 257
VOCAB_SIZE = 258
CONTEXT = 64
TIMEOUT = 10.0

CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == "assistant" and loop.first -%}
{{ raise_exception("assistant first: " ~ message.content) }}
{%- endif -%}
{{ message.role[0] }}:{{ message.content }}{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}a:{%- endif -%}"""

Script = Callable[[Sequence], list[int]]


def byte_tokenizer(*, bos: bool = False) -> Tokenizer:
    """One token per byte in the order of the byte-level alphabet, then the two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": BOS, "</s>": EOS}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer


def ids_of(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


def constant(text: str) -> Script:
    """Every sequence continues with `text`, then EOS for ever."""
    ids = ids_of(text)
    return lambda sequence: ids + [EOS] * (sequence.params.max_tokens + 1)


class DeviceLostError(Exception):
    """What a scripted engine takes for the end of its device."""


@dataclass
class ScriptedEngine:
    """Delivers `script(sequence)`, `tokens_per_step` at a time, in rows as the real one.

    `gate` holds every step until it is set, `hold_after` clears it in that step, so before its output
    is seen; `failures` are raised by the next steps. `num_reused` of every prompt were cached.
    """

    script: Script = field(default_factory=lambda: constant("abcdefghij"))
    tokens_per_step: int = 3
    max_num_seqs: int = 4
    context: int = CONTEXT
    gate: threading.Event = field(default_factory=threading.Event)
    hold_after: int | None = None
    failures: deque[Exception] = field(default_factory=deque)
    added: list[Sequence] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    last_step: StepStats = field(default_factory=StepStats)
    num_steps: int = 0
    draft_enabled: bool = True
    num_reused: int = 0
    _running: list[Sequence] = field(default_factory=list)
    _waiting: deque[Sequence] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def _num_free(self) -> int:
        return self.max_num_seqs - len(self._running)

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def cache_usage(self) -> dict[str, float]:
        return {"target": len(self._running) / self.max_num_seqs}

    def retreat(self, error: Exception) -> Retreat | None:
        return None

    def is_device_lost(self, error: Exception) -> bool:
        return isinstance(error, DeviceLostError)

    def add(self, sequence: Sequence) -> None:
        if len(sequence.prompt_ids) + sequence.params.max_tokens > self.context:
            raise ValueError("max_tokens and the prompt must fit")
        self.added.append(sequence)
        self._waiting.append(sequence)

    def cancel(self, sequence_id: str) -> bool:
        self.cancelled.append(sequence_id)
        before = self.num_running + self.num_waiting
        self._running = [each for each in self._running if each.id != sequence_id]
        self._waiting = deque(each for each in self._waiting if each.id != sequence_id)
        return self.num_running + self.num_waiting < before

    def step(self) -> list[SequenceOutput]:
        assert self.gate.wait(TIMEOUT)
        self.num_steps += 1
        if self.num_steps == self.hold_after:
            self.gate.clear()
        if self.failures:
            raise self.failures.popleft()
        admitted = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._num_free))]
        self._running += admitted
        rows = list(self._running)
        outputs = [self._advance(sequence) for sequence in rows]
        method = rows[0].config.method
        ids = tuple(each.id for each in rows)
        self.last_step = StepStats(
            method,
            replace(rows[0].config.preset, adaptive=False).name,
            len(rows),
            num_tree_nodes=4,
            decode_ids=ids,
            admitted_ids=tuple(each.id for each in admitted),
            prompt_tokens=sum(len(each.prompt_ids) for each in admitted),
            cached_prompt_tokens=self.num_reused * len(admitted),
            forward_times=(ForwardTime("target", "decode", method, 1, 0.001, ids),),
        )
        return outputs

    def _advance(self, sequence: Sequence) -> SequenceOutput:
        start = len(sequence.output_ids)
        new = self.script(sequence)[start : start + self.tokens_per_step][: sequence.remaining]
        reason = stop_id = None
        for position, token in enumerate(new):
            if token in sequence.params.stop_token_ids or (token == EOS and not sequence.params.ignore_eos):
                new, reason = new[: position + 1], FinishReason.STOP
                stop_id = token
                break
        sequence.output_ids += new
        if reason is None and sequence.remaining == 0:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._running.remove(sequence)
        drafted = sequence.config.preset.depth
        num_top = sequence.params.num_top_log_probs
        first = start == 0 and sequence.params.prompt_log_probs
        return SequenceOutput(
            sequence.id,
            new,
            [-0.5] * len(new),
            finish_reason=reason,
            stop_token_id=stop_id,
            num_draft_tokens=drafted,
            num_draft_nodes=drafted,
            num_accepted_tokens=min(max(len(new) - 1, 0), drafted),
            top_log_probs=[scripted_top(token, num_top) for token in new] if num_top else None,
            prompt_log_probs=scripted_scores(sequence) if first else None,
            num_reused=self.num_reused,
            preset=replace(sequence.config.preset, adaptive=False).name,
        )


def scripted_top(token: int, num_top: int) -> TopLogProbs:
    """The token itself with -0.5, then its successors, each 1 nat less; the last one is impossible."""
    values = [-0.5 - place for place in range(num_top)]
    values[2:] = [-math.inf] * len(values[2:])
    return tuple(((token + place) % VOCAB_SIZE, value) for place, value in enumerate(values))


def scripted_scores(sequence: Sequence) -> list[TokenLogProb]:
    """Of the prompt from its second token on: -0.25 less its place."""
    num_top = sequence.params.num_top_log_probs
    return [
        TokenLogProb(-0.25 - place, scripted_top(token, num_top))
        for place, token in enumerate(sequence.prompt_ids[1:])
    ]


def ready_event(tokenizer_file: str, *, has_draft: bool = True, context: int = CONTEXT) -> ReadyEvent:
    return ReadyEvent(
        vocab_size=VOCAB_SIZE,
        max_model_len=context,
        eos_token_ids=[EOS],
        bos_token_id=BOS,
        tokenizer_file=tokenizer_file,
        has_draft=has_draft,
        description="a scripted pair",
        device="cpu",
        memory_bytes=1,
        load_seconds=0.25,
        role_load_seconds={"target": 0.2, "draft": 0.05} if has_draft else {"target": 0.2},
        chat_template=CHAT_TEMPLATE,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


class ThreadWorker:
    """A transport whose worker is a thread: commands and events really cross as frames.

    `say_ready` and `die` do from a test what a process does by itself.
    """

    def __init__(
        self,
        load: LoadCommand,
        on_event: Callable[[Event], None],
        on_lost: Callable[[], None],
        *,
        engine: ScriptedEngine,
        ready: ReadyEvent | None,
    ) -> None:
        self.load = load
        self.commands: list[Command] = []
        self.stop_is_deaf = False
        self.num_replaced = 0
        self._on_event = on_event
        self._on_lost = on_lost
        self._engine = engine
        self._ready = ready
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._decode: FrameDecoder[Command] = FrameDecoder(Command)
        self._reader: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        loop = WorkerLoop(self._engine, self._inbox, Outbox(theirs))

        def body() -> None:
            with theirs:
                loop.run()

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()
        self._reader = asyncio.get_running_loop().create_task(self._read(ours))
        if self._ready is not None:
            self._on_event(self._ready)

    def say_ready(self, ready: ReadyEvent) -> None:
        self._on_event(ready)

    def die(self) -> None:
        self._on_lost()

    def replace(self) -> None:
        self.num_replaced += 1
        self._on_lost()

    def send(self, command: Command) -> None:
        frame = encode_frame(command)
        self.commands.append(command)
        self._inbox.put(self._decode.decode(frame[HEADER_BYTES:]))

    async def stop(self) -> None:
        if self.stop_is_deaf:
            return
        self._engine.gate.set()
        self.send(StopCommand())
        assert self._reader is not None
        await self._reader

    def kill(self) -> None:
        raise AssertionError("a test does not end like this")

    async def _read(self, link: socket.socket) -> None:
        decoder: FrameDecoder[Event] = FrameDecoder(Event)
        reader, writer = await asyncio.open_connection(sock=link)
        turn = Turn()
        try:
            while True:
                await turn.pass_on()
                header = await reader.readexactly(HEADER_BYTES)
                self._on_event(decoder.decode(await reader.readexactly(frame_length(header))))
        except asyncio.IncompleteReadError:
            writer.close()
            await writer.wait_closed()


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = TIMEOUT) -> None:
    """Polls a condition; fails when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value if isinstance(value, bool) else await value:
            return
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def save_tokenizer(folder: Path, *, bos: bool = False) -> str:
    path = folder / "tokenizer.json"
    byte_tokenizer(bos=bos).save(str(path))
    return str(path)
