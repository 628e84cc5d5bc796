"""MTJD: the target's own most likely block, searched with beams over the target; the costly reference.

(Qin et al., ICLR 2025.) At temperature 0 it is beam search, above it the likeliest of sampled beams.
"""

import torch
from torch import Tensor

from decoding.batch import Batch
from decoding.beam import CANDIDATES_PER_BEAM, beam_search
from decoding.methods.step import DecodeStep, top_tokens
from decoding.model_pair import ModelPair
from decoding.token_tree import TokenTree, gather_at


class MTJD:
    """The final beam of highest joint p is delivered whole; no token follows it."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        target, lengths = pair.target, batch.lengths
        root = TokenTree.of_roots(batch.roots, 1)
        logits = target.forward(batch.rows, lengths, root)
        levels: list[Tensor] = []
        # Sampled beams may take any token; beam search takes none but a beam's likeliest.
        num_offered = CANDIDATES_PER_BEAM if batch.sampling.all_greedy else pair.vocab_size
        tree, beams = beam_search(target, batch, logits, num_offered=num_offered, levels=levels)
        path = tree.path(beams.best(), batch.depth)
        token_ids, num_tokens = tree.token_ids.gather(1, path), (path > 0).sum(1)
        at_parents = _parent_logits(levels, path, batch.width).log_softmax(-1)
        log_probs = at_parents.gather(2, token_ids[:, :, None])[:, :, 0]
        top_ids, top_values = top_tokens(batch, at_parents)
        step = DecodeStep(
            token_ids=token_ids,
            log_probs=log_probs,
            num_tokens=num_tokens,
            num_accepted=num_tokens - 1,
            num_drafted=batch.limits - 1,
            finite=tree.finite & levels[0].amax(-1).isfinite().all(1),
            num_nodes=tree.num_nodes - 1,
            top_ids=top_ids,
            top_log_probs=top_values,
        )
        batch.advance(token_ids, num_tokens)
        target.commit(batch.rows, lengths, path)
        return step


def _parent_logits(levels: list[Tensor], path: Tensor, width: int) -> Tensor:
    """Logits `[rows, depth, vocab]` that each token of a path was drawn from, out of those of all beams."""
    parts = []
    for depth, logits in enumerate(levels):
        first = 1 + (depth - 1) * width
        slots = torch.zeros_like(path[:, 0]) if depth == 0 else (path[:, depth - 1] - first).clamp(min=0)
        parts.append(gather_at(logits, slots))
    return torch.stack(parts, dim=1)
