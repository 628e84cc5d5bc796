"""Multi-candidate speculative decoding: a tree sampled from the draft, recursive rejection; exactly p.

(SpecInfer, Miao et al. 2024; MCSD, Yang et al. 2024.) Nodes are numbered level by level, so the
children of the j-th node of a level are the places j * children onwards of the next.
"""

import torch
from torch import Tensor

from decoding.acceptance import recursive_rejection_sample
from decoding.batch import Batch
from decoding.methods.step import DecodeStep, collect
from decoding.model import CausalModel
from decoding.model_pair import ModelPair
from decoding.sampler import Draw, gumbel, sample, uniforms
from decoding.token_tree import TokenTree, gather_at


class MultiCandidate:
    """`candidates_per_level` children of every node, tried one after the other down the tree."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        assert pair.draft is not None
        lengths, streams = batch.lengths, batch.streams
        tree, draft_log_probs = self._propose(pair.draft, batch, streams)
        logits = pair.target.forward(batch.rows, lengths, tree)
        target_log_probs = batch.log_probs(logits, tree, point_mass=True)
        node, law = self._descend(tree, batch, streams, target_log_probs, draft_log_probs)
        path = tree.path(node, batch.depth)
        next_ids = sample(law, uniforms(streams, Draw.NEXT))
        step = collect(batch, tree, path, logits, gather_at(tree.depths, node), next_ids)
        pair.target.commit(batch.rows, lengths, path)
        pair.draft.commit(batch.rows, lengths, path)
        return step

    def _propose(self, draft: CausalModel, batch: Batch, streams: Tensor) -> tuple[TokenTree, Tensor]:
        """The tree, and q at every node that has children, `[rows, inner nodes, vocab]`."""
        sizes = level_sizes(batch.preset.candidates)
        tree = TokenTree.of_roots(batch.roots, sum(sizes))
        logits = draft.catch_up(batch.rows, batch.lengths, batch.last_tokens)[:, None]
        laws, parent = [], 0
        for depth, children in enumerate(batch.preset.candidates, start=1):
            first, size = parent + sizes[depth - 1], sizes[depth]
            if depth > 1:
                logits = draft.forward(batch.rows, batch.lengths, tree, first=parent, count=sizes[depth - 1])
            tree.note_finite(logits)
            log_probs = batch.log_probs(logits, tree, parent, point_mass=False)
            parents = torch.arange(parent, first, device=streams.device).expand(len(streams), -1)
            token_ids = self._children(log_probs, batch, streams, depth, parents, children)
            scores = log_probs.gather(2, token_ids).flatten(1).double()
            parents = parents.repeat_interleave(children, dim=1)
            tree.add_level(
                first,
                depth,
                token_ids=token_ids.flatten(1),
                parents=parents,
                draft_log_probs=tree.draft_log_probs.gather(1, parents) + scores,
                ended=torch.zeros(len(streams), size, dtype=torch.bool, device=streams.device),
            )
            laws.append(log_probs)
            parent = first
        return tree, torch.cat(laws, dim=1)

    def _children(
        self, log_probs: Tensor, batch: Batch, streams: Tensor, depth: int, parents: Tensor, count: int
    ) -> Tensor:
        """Tokens `[rows, parents, count]` in the order drawn; a greedy row takes the likeliest ones."""
        best = log_probs.topk(count, dim=-1).indices
        if batch.sampling.all_greedy:
            return best
        stream, node = streams[:, None, None], parents[:, :, None]
        if batch.preset.replacement:
            place = torch.arange(count, device=parents.device)
            chances = uniforms(stream, Draw.CHAIN, depth, node, place)
            drawn = torch.stack([sample(log_probs, each) for each in chances.unbind(-1)], dim=-1)
        else:
            token = torch.arange(log_probs.shape[-1], device=parents.device)
            noise = gumbel(uniforms(stream, Draw.CHAIN, depth, node, token))
            drawn = (log_probs + noise).topk(count, dim=-1).indices
        return torch.where(batch.sampling.greedy[:, None, None], best, drawn)

    def _descend(
        self,
        tree: TokenTree,
        batch: Batch,
        streams: Tensor,
        target_log_probs: Tensor,
        draft_log_probs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The deepest accepted node `[rows]` and the law of the token behind it, `[rows, vocab]` in logs."""
        limits, sizes = batch.limits, level_sizes(batch.preset.candidates)
        node = place = torch.zeros_like(limits)
        law, going = target_log_probs[:, 0], torch.ones_like(limits, dtype=torch.bool)
        first = 0
        for depth, children in enumerate(batch.preset.candidates, start=1):
            first += sizes[depth - 1]
            tries = torch.arange(children, device=node.device)
            nodes = first + place[:, None] * children + tries
            token_ids = tree.token_ids.gather(1, nodes)
            accepted, residual = recursive_rejection_sample(
                token_ids,
                law,
                gather_at(draft_log_probs, node.clamp(max=draft_log_probs.shape[1] - 1)),
                uniforms(streams[:, None], Draw.ACCEPT, depth, node[:, None], tries),
                replacement=batch.preset.replacement,
            )
            tried = going & (depth <= limits)
            going = tried & (accepted >= 0)
            place = torch.where(going, place * children + accepted, place)
            node = torch.where(going, first + place, node)
            law = torch.where(
                tried[:, None], torch.where(going[:, None], gather_at(target_log_probs, node), residual), law
            )
        return node, law


def level_sizes(candidates: tuple[int, ...]) -> list[int]:
    """Nodes at depth 0, 1, ... of a tree with so many children per level."""
    sizes = [1]
    for children in candidates:
        sizes.append(sizes[-1] * children)
    return sizes
