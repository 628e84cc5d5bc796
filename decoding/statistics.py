"""What an engine says of its last step, and where its time went."""

from dataclasses import dataclass, field
from typing import Literal

from decoding.sequence import Sequence

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
    """What the first part of a step did, as `StepStats` tells it."""

    prefill_id: str | None = None
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    admitted_ids: list[str] = field(default_factory=list)

    def note(self, sequence: Sequence) -> None:
        """A sequence has left the queue."""
        self.admitted_ids.append(sequence.id)
        self.prompt_tokens += len(sequence.prompt_ids)
        self.cached_tokens += sequence.num_reused or 0


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did, and for which sequences.

    Times are wall seconds, nodes are counted per row, roots apart. `prefill_id` is the sequence whose
    prompt was run, `decode_ids` are those of the group that was decoded, `preset` is its preset's name.
    `admitted_ids` are the sequences that were given a row, or that only wanted their prompt scored,
    `prompt_tokens` all of their prompts, `cached_prompt_tokens` those that had not to be run for them.
    """

    method: str | None = None
    preset: str | None = None
    num_sequences: int = 0
    num_tree_nodes: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_id: str | None = None
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
