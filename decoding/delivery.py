"""What one row of a step means for its sequence: the tokens that count, and whether it ended."""

from collections.abc import Sequence as Series

from decoding.batch import sequence_end_ids
from decoding.config import Preset
from decoding.methods.step import RowStep
from decoding.sequence import FinishReason, Sequence, SequenceOutput, TokenLogProb


def deliver(
    sequence: Sequence,
    row: RowStep,
    *,
    shape: Preset,
    num_nodes: int,
    eos_token_ids: Series[int],
    prompt_log_probs: list[TokenLogProb] | None,
) -> SequenceOutput:
    """Take one row of a step of `shape` into its sequence, cut at the first end."""
    sequence.num_steps += 1
    if not row.finite:
        return SequenceOutput(sequence.id, [], [], finish_reason=FinishReason.ERROR, preset=shape.name)
    ends = sequence_end_ids(sequence, eos_token_ids)
    stop = next((index for index, token in enumerate(row.token_ids) if token in ends), None)
    kept = len(row.token_ids) if stop is None else stop + 1
    sequence.output_ids += row.token_ids[:kept]
    if sequence.config.uses_draft and shape.step_method == "target":
        sequence.draft_lag += kept
    reason = FinishReason.STOP if stop is not None else None
    if reason is None and sequence.remaining <= 0:
        reason = FinishReason.LENGTH
    num_top = sequence.params.num_top_log_probs
    return SequenceOutput(
        id=sequence.id,
        token_ids=row.token_ids[:kept],
        log_probs=row.log_probs[:kept],
        finish_reason=reason,
        stop_token_id=None if stop is None else row.token_ids[stop],
        num_draft_tokens=row.num_drafted,
        num_draft_nodes=num_nodes,
        num_accepted_tokens=row.num_accepted,
        top_log_probs=[top[:num_top] for top in row.top_log_probs[:kept]] if num_top else None,
        prompt_log_probs=prompt_log_probs,
        preset=shape.name,
        num_reused=sequence.num_reused or 0,
    )
