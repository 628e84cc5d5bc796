"""MTJD: the target's own most likely block, searched with beams over the target; the costly reference.

(Qin et al., ICLR 2025.) At temperature 0 it is beam search, above it the likeliest of sampled beams.
"""

import torch
from torch import Tensor

from decoding.batch import Batch
from decoding.beam import beam_search
from decoding.methods.step import DecodeStep
from decoding.model import ModelPair
from decoding.token_tree import TokenTree, gather_at


class MTJD:
    """The final beam of highest joint p is delivered whole; no token follows it."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        target, lengths = pair.target, batch.lengths
        root = TokenTree.of_roots(batch.roots, 1)
        logits = target.forward(batch.rows, lengths, root)
        tree, beams, levels = beam_search(target, batch, logits, num_offered=pair.vocab_size)
        path = tree.path(beams.best(), batch.depth)
        token_ids, num_tokens = tree.token_ids.gather(1, path), (path > 0).sum(1)
        step = DecodeStep(
            token_ids=token_ids,
            log_probs=_raw_log_probs(levels, path, token_ids, batch.width),
            num_tokens=num_tokens,
            num_accepted=num_tokens - 1,
            num_drafted=batch.limits() - 1,
            finite=tree.finite & levels[0].logsumexp(-1).isfinite().all(1),
            num_nodes=tree.num_nodes - 1,
        )
        batch.advance(token_ids, num_tokens)
        target.commit(batch.rows, lengths, path)
        return step


def _raw_log_probs(levels: list[Tensor], path: Tensor, token_ids: Tensor, width: int) -> Tensor:
    """Untransformed log-probs `[rows, depth]` of a path's tokens, from the logits of each level's parents."""
    parts = []
    for depth, logits in enumerate(levels):
        first = 1 + (depth - 1) * width
        slots = torch.zeros_like(path[:, 0]) if depth == 0 else (path[:, depth - 1] - first).clamp(min=0)
        at_parent = gather_at(logits, slots)
        chosen = at_parent.gather(1, token_ids[:, depth : depth + 1])[:, 0]
        parts.append(chosen - at_parent.logsumexp(-1))
    return torch.stack(parts, dim=1)
