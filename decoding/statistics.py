"""What an engine says of its last step, and where its time went."""

from dataclasses import dataclass, field
from typing import Literal

from decoding.sequence import Sequence, TokenLogProb

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class ForwardTime:
    """Passes of one model in one phase of a step, for `sequence_ids` in equal parts.

    `role` is `target` or `draft`, `method` that of the sequences. `seconds` are the device's: on a GPU
    from the first kernel of a pass to its last.
    """

    role: str
    phase: Phase
    method: str
    num_passes: int
    seconds: float
    sequence_ids: tuple[str, ...]


@dataclass(slots=True)
class Admissions:
    """What the first part of a step did: chunks with their seconds, and who left the queue.

    `long_seconds` are those of prompts of several chunks; `admitted` has the prompt's log-probabilities
    where they were asked for.
    """

    prefills: list[tuple[str, float]] = field(default_factory=list)
    prefill_tokens: int = 0
    long_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    admitted: list[tuple[Sequence, list[TokenLogProb] | None]] = field(default_factory=list)

    def note_chunk(self, sequence: Sequence, num_tokens: int, seconds: float, *, is_long: bool) -> None:
        self.prefills.append((sequence.id, seconds))
        self.prefill_tokens += num_tokens
        self.long_seconds += seconds if is_long else 0.0

    def note_admission(self, sequence: Sequence, prompt_log_probs: list[TokenLogProb] | None) -> None:
        self.admitted.append((sequence, prompt_log_probs))
        self.prompt_tokens += len(sequence.prompt_ids)
        self.cached_tokens += sequence.num_reused or 0


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did, and for which sequences.

    Times are wall seconds, nodes are counted per row, roots apart. `prefills` are the sequences whose
    prompts were run, each with its seconds, `decode_ids` are those of the group that was decoded,
    `preset` is its preset's name. `admitted_ids` are the sequences that were given a row, or that only
    wanted their prompt scored, `prompt_tokens` all of their prompts, `cached_prompt_tokens` those that
    had not to be run for them.
    """

    method: str | None = None
    preset: str | None = None
    num_sequences: int = 0
    num_tree_nodes: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefills: tuple[tuple[str, float], ...] = ()
    decode_ids: tuple[str, ...] = ()
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    admitted_ids: tuple[str, ...] = ()
    forward_times: tuple[ForwardTime, ...] = ()


@dataclass(frozen=True, slots=True)
class Retreat:
    """What a step that raised came to: its `cause`, and the ids of the sequences that cannot go on."""

    cause: Literal["out_of_memory", "draft_failed"]
    lost: list[str]
