"""What an engine says of its last step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did, and for which sequences.

    Times are wall seconds, nodes are counted per row, roots apart. `prefill_id` is the sequence whose
    prompt was run, `decode_ids` are those of the group that was decoded.
    """

    method: str | None = None
    num_sequences: int = 0
    num_tree_nodes: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_id: str | None = None
    decode_ids: tuple[str, ...] = ()
