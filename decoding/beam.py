"""Beam proposals: beam search at temperature 0, beam sampling without replacement above."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.batch import Batch
from decoding.model import CausalModel
from decoding.sampler import Draw, gumbel, likeliest, uniforms
from decoding.token_tree import TokenTree, gather_at

CANDIDATES_PER_BEAM = 64  # a beam offers its likeliest tokens; exact for beam search up to this width


@dataclass(slots=True)
class Beams:
    """The live continuations after some depth: their nodes and joint log q, both `[rows, width]`."""

    nodes: Tensor
    scores: Tensor

    def best(self) -> Tensor:
        """The node of the beam of highest joint q, `[rows]`."""
        return gather_at(self.nodes, self.scores.argmax(1))


@dataclass(slots=True)
class _Candidates:
    """Continuations in tie order (token id, then parent): all `[rows, candidates]`."""

    token_ids: Tensor
    beams: Tensor
    parents: Tensor
    scores: Tensor

    def take(self, numbers: Tensor) -> "_Candidates":
        """The candidates of these numbers `[rows, taken]`."""
        parts = (self.token_ids, self.beams, self.parents, self.scores)
        return _Candidates(*(part.gather(1, numbers) for part in parts))


def propose_tree(draft: CausalModel, batch: Batch) -> tuple[TokenTree, Beams]:
    """The draft's beams as a tree, its last committed token caught up on; see `beam_search`."""
    logits = draft.catch_up(batch.rows, batch.lengths, batch.last_tokens)[:, None]
    return beam_search(draft, batch, logits, num_offered=CANDIDATES_PER_BEAM)


def beam_search(
    model: CausalModel,
    batch: Batch,
    logits: Tensor,
    *,
    num_offered: int,
    levels: list[Tensor] | None = None,
) -> tuple[TokenTree, Beams]:
    """Search `batch.depth` levels of `batch.width` beams over one model; keep every beam as a node.

    Nodes of depth d are 1 + (d - 1) * width onwards. A beam that ended, or that reached the row's own
    limit, stays in the beam with unchanged score; its slots at later depths are padding. `logits`
    `[rows, 1, vocab]` are the root's; each beam offers its `num_offered` likeliest tokens. Returns the
    tree and the final beams; `levels` takes the logits of each level's parents, `[rows, beams, vocab]`.
    (Qin et al. 2025; sampling is a Plackett-Luce draw by Gumbel-top-k.)
    """
    width, limits, streams = batch.width, batch.limits, batch.streams
    tree = TokenTree.of_roots(batch.roots, 1 + batch.depth * width)
    beams = Beams(tree.parents[:, :1], tree.draft_log_probs[:, :1])
    for depth in range(1, batch.depth + 1):
        parent = max(1 + (depth - 2) * width, 0)
        if depth > 1:
            logits = model.forward(batch.rows, batch.lengths, tree, first=parent, count=width)
        if levels is not None:
            levels.append(logits.clone())  # the model's next pass may use their memory again
        tree.note_finite(logits)
        frozen = tree.ended.gather(1, beams.nodes) | (depth > limits)[:, None]
        log_probs = batch.log_probs(logits, tree, parent, point_mass=False)
        candidates = _candidates(tree, beams, frozen, log_probs, num_offered)
        chosen = candidates.take(_ranking(candidates, batch, streams, depth)[:, :width])
        beams = _extend(tree, chosen, frozen.gather(1, chosen.beams), batch, depth)
    return tree, beams


def _candidates(
    tree: TokenTree, beams: Beams, frozen: Tensor, log_probs: Tensor, num_offered: int
) -> _Candidates:
    """Every live beam offers its likeliest tokens, a frozen one only itself, with its own score."""
    values, token_ids = likeliest(log_probs, min(num_offered, log_probs.shape[-1]))
    scores = beams.scores[:, :, None] + values.double()
    own_token = tree.token_ids.gather(1, beams.nodes)
    scores = torch.where(frozen[:, :, None], -math.inf, scores)
    scores[:, :, 0] = torch.where(frozen, beams.scores, scores[:, :, 0])
    token_ids[:, :, 0] = torch.where(frozen, own_token, token_ids[:, :, 0])
    slots = torch.arange(beams.nodes.shape[1], device=frozen.device)[None, :, None].expand_as(token_ids)
    parents = beams.nodes[:, :, None].expand_as(token_ids)
    order = (token_ids * tree.num_nodes + parents).flatten(1).argsort(dim=1, stable=True)
    flat = (part.flatten(1).gather(1, order) for part in (token_ids, slots, parents, scores))
    return _Candidates(*flat)


def _ranking(candidates: _Candidates, batch: Batch, streams: Tensor, depth: int) -> Tensor:
    """Candidate numbers from best to worst, `[rows, at least width]`; noise above temperature 0."""
    scores = candidates.scores
    if not batch.sampling.all_greedy:
        noise = uniforms(streams[:, None], Draw.BEAM, depth, candidates.parents, candidates.token_ids)
        perturbed = scores + gumbel(noise)
        scores = torch.where(batch.sampling.greedy[:, None], scores, perturbed)
    return scores.sort(dim=1, descending=True, stable=True).indices


def _extend(tree: TokenTree, chosen: _Candidates, stays: Tensor, batch: Batch, depth: int) -> Beams:
    """Write what was chosen as the nodes of this depth and return the beams they form.

    A beam that `stays` `[rows, chosen]` keeps its node, and padding takes its place in the level.
    """
    first = 1 + (depth - 1) * batch.width
    count = chosen.token_ids.shape[1]
    new = torch.arange(first, first + count, device=stays.device)
    real = ~stays & (chosen.scores > -math.inf)
    tree.add_level(
        first,
        depth,
        token_ids=chosen.token_ids,
        parents=chosen.parents,
        draft_log_probs=torch.where(real, chosen.scores, -math.inf),
        ended=batch.ends(chosen.token_ids) & real,
    )
    kept = Beams(torch.where(stays, chosen.parents, new), chosen.scores)
    missing = batch.width - count
    return kept if missing <= 0 else _padded(kept, missing)


def _padded(beams: Beams, missing: int) -> Beams:
    """Fill up a beam that has fewer candidates than its width."""
    rows, device = beams.nodes.shape[0], beams.nodes.device
    nodes = torch.zeros(rows, missing, dtype=torch.long, device=device)
    scores = torch.full((rows, missing), -math.inf, dtype=torch.float64, device=device)
    return Beams(torch.cat([beams.nodes, nodes], 1), torch.cat([beams.scores, scores], 1))
