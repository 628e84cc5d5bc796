"""What the draft has not run of a text, since the target went on alone: run before it proposes again."""

from collections.abc import Sequence as Series

import torch

from decoding.kv_cache import round_up
from decoding.model import CausalModel
from decoding.sequence import Sequence
from decoding.token_tree import TokenTree

GAP_TOKENS = 64  # most tokens of a row in one pass
GAP_BUCKET = 4


def close_gaps(draft: CausalModel, rows: slice, sequences: Series[Sequence]) -> None:
    """Bring the draft's rows to where a proposal begins: with all committed tokens but the last.

    The last one is left to `catch_up`, as always. Rows that lag less than others are padded behind their
    end, where the next pass writes again.
    """
    gaps = [sequence.draft_gap_ids() for sequence in sequences]
    longest = max(len(gap) for gap in gaps)
    ends = [max(sequence.num_cached - 1, 0) for sequence in sequences]
    for first in range(0, longest, GAP_TOKENS):
        parts = [gap[first : first + GAP_TOKENS] for gap in gaps]
        count = round_up(max(len(part) for part in parts), GAP_BUCKET)
        starts = [end - len(gap[first:]) for end, gap in zip(ends, gaps, strict=True)]
        draft.cache.lengths[rows] = starts
        draft.forward(
            rows,
            torch.tensor(starts, device=draft.device),
            TokenTree.chain_of(
                torch.tensor([part + [0] * (count - len(part)) for part in parts], device=draft.device)
            ),
            keep=1,
        )
    if longest:
        draft.cache.lengths[rows] = [sequence.num_cached for sequence in sequences]
        for sequence in sequences:
            sequence.draft_lag = 0
