"""Speculative decoding: a chain sampled from the draft, verified by token or as a block; exactly p.

(Leviathan et al. 2023; Chen et al. 2023; block verification: Sun et al. 2024.)
"""

import torch
from torch import Tensor

from decoding.acceptance import block_verify, rejection_sample
from decoding.batch import Batch
from decoding.methods.step import DecodeStep, collect
from decoding.model import CausalModel
from decoding.model_pair import ModelPair
from decoding.sampler import Draw, sample, uniforms
from decoding.token_tree import TokenTree

VERIFIERS = {"token": rejection_sample, "block": block_verify}


class Speculative:
    """`num_speculative_tokens` sampled from q, then as many kept as the ratio p / q allows."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        assert pair.draft is not None
        limits, streams = batch.limits, batch.streams
        tree, draft_log_probs = _propose_chain(pair.draft, batch, limits, streams)
        logits = pair.target.forward(batch.rows, batch.lengths, tree)
        depths = torch.arange(1, batch.depth + 1, device=streams.device)
        num_accepted, next_ids = VERIFIERS[batch.preset.acceptance](
            tree.token_ids[:, 1:],
            draft_log_probs,
            batch.log_probs(logits, tree, point_mass=True),
            limits,
            uniforms(streams[:, None], Draw.ACCEPT, depths),
            uniforms(streams, Draw.NEXT),
        )
        # A chain lies where its accepted part belongs: nothing to move in either cache.
        return collect(batch, tree, depths.repeat(len(limits), 1), logits, num_accepted, next_ids)


def _propose_chain(
    draft: CausalModel, batch: Batch, limits: Tensor, streams: Tensor
) -> tuple[TokenTree, Tensor]:
    """A chain drawn from q, and q at each of its tokens, `[rows, depth, vocab]`."""
    tree = TokenTree.of_roots(batch.roots, 1 + batch.depth)
    logits = draft.catch_up(batch.rows, batch.lengths, batch.last_tokens)[:, None]
    laws = []
    for depth in range(1, batch.depth + 1):
        if depth > 1:
            logits = draft.forward(batch.rows, batch.lengths, tree, first=depth - 1, count=1)
        tree.note_finite(logits)
        log_probs = batch.log_probs(logits, tree, depth - 1, point_mass=True)
        token_ids = sample(log_probs, uniforms(streams, Draw.CHAIN, depth)[:, None])
        drawn = log_probs.gather(2, token_ids[:, :, None])[:, :, 0].double()
        tree.add_level(
            depth,
            depth,
            token_ids=token_ids,
            parents=torch.full_like(token_ids, depth - 1),
            draft_log_probs=tree.draft_log_probs[:, depth - 1 : depth] + drawn,
            ended=torch.zeros_like(token_ids, dtype=torch.bool),
        )
        laws.append(log_probs[:, 0])
    return tree, torch.stack(laws, dim=1)
