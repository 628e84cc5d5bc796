"""What an engine says of its last step, and where its time went."""

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did, and for which sequences.

    Times are wall seconds, nodes are counted per row, roots apart. `prefill_id` is the sequence whose
    prompt was run, `decode_ids` are those of the group that was decoded, `preset` is its preset's name.
    `cached_prompt_tokens` are those of admitted prompts that were in the cache already.
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
    cached_prompt_tokens: int = 0
    forward_times: tuple[ForwardTime, ...] = ()
