"""Exact multi-token joint decoding: at every step the likeliest block of three tokens of all there are.

Beams only find it if they are as many as the vocabulary squared. Here all first tokens are expanded, then
pairs in order of likelihood until none is left that could still begin a likelier block than the best one
found: the same block as enumerating all of them gives, for a vocabulary of about a hundred at most.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.generation import Generation
from decoding import ModelPair, SamplingParams
from decoding.host import to_host
from decoding.sampler import RowSampling, to_log_probs
from decoding.token_tree import TokenTree

BLOCK = 3  # tokens
CHUNK = 12  # pairs that are expanded together


@dataclass(slots=True)
class _Rows:
    """The rows of one batch: committed `lengths` and `roots` `[rows]`, and their transforms."""

    pair: ModelPair
    rows: slice
    lengths: Tensor
    roots: Tensor
    sampling: RowSampling
    ends: Tensor

    def laws(self, tree: TokenTree, first: int, count: int) -> Tensor:
        """Log-probabilities `[rows, count, vocab]` at nodes `first` onwards, after the transforms."""
        logits = self.pair.target.forward(self.rows, self.lengths, tree, first=first, count=count)
        return to_log_probs(logits, self.sampling, point_mass=False).double()


@torch.inference_mode()
def exact_mtjd(
    pair: ModelPair, prompts: list[list[int]], params: SamplingParams, batch: int
) -> list[Generation]:
    """Decode by the likeliest blocks of the transformed target; log-probs are left to be scored.

    Above temperature 0 this is what `mtjd` tends to as its beam widens. A block may pass `max_tokens`
    and is cut there.
    """
    results: list[Generation] = []
    for start in range(0, len(prompts), batch):
        results += _decode_batch(pair, prompts[start : start + batch], params)
    return results


def _decode_batch(pair: ModelPair, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    target = pair.target
    for row, prompt in enumerate(prompts):
        target.cache.lengths[row] = 0
        if len(prompt) > 1:
            target.prefill(row, prompt[:-1])
    state = _Rows(
        pair=pair,
        rows=slice(0, len(prompts)),
        lengths=torch.tensor([len(prompt) - 1 for prompt in prompts]),
        roots=torch.tensor([prompt[-1] for prompt in prompts]),
        sampling=RowSampling.of([params] * len(prompts), pair.vocab_size, pair.device),
        ends=torch.tensor(pair.eos_token_ids, dtype=torch.long),
    )
    results = [Generation() for _ in prompts]
    while any(not _finished(result, params) for result in results):
        blocks = best_blocks(state)
        for result, block in zip(results, to_host(blocks), strict=True):
            if not _finished(result, params):
                _deliver(result, [int(token) for token in block], pair.eos_token_ids, params)
        _advance(state, blocks)
    target.cache.lengths[: len(prompts)] = [0] * len(prompts)
    return results


def _finished(result: Generation, params: SamplingParams) -> bool:
    return result.ended or len(result.token_ids) >= params.max_tokens


def _deliver(result: Generation, block: list[int], ends: tuple[int, ...], params: SamplingParams) -> None:
    result.num_steps += 1
    for token in block[: params.max_tokens - len(result.token_ids)]:
        result.token_ids.append(token)
        if token in ends:
            result.ended = True
            return


def best_blocks(state: _Rows) -> Tensor:
    """The likeliest blocks `[rows, 3]`; behind an end id the tokens mean nothing."""
    vocab, count = state.pair.vocab_size, len(state.roots)
    first = state.laws(TokenTree.of_roots(state.roots, 1), 0, 1)[:, 0]
    tree = _first_level(state, 1 + vocab)
    second = first[:, :, None] + state.laws(tree, 1, vocab)
    best = torch.zeros(count, BLOCK, dtype=torch.long)
    found = torch.full((count,), -math.inf, dtype=torch.float64)
    # A block that ends early is complete: its score is that of what it holds.
    for token in to_host(state.ends):
        _keep(best, found, first[:, token], torch.full((count, 1), token))
        second[:, token] = -math.inf
        score, before = second[:, :, token].max(1)
        _keep(best, found, score, torch.stack([before, torch.full_like(before, token)], 1))
        second[:, :, token] = -math.inf
    pairs = second.flatten(1).sort(dim=1, descending=True, stable=True)
    for start in range(0, vocab * vocab, CHUNK):
        scores = pairs.values[:, start : start + CHUNK]
        if not (scores[:, 0] > found).any():
            return best
        _expand(state, best, found, pairs.indices[:, start : start + CHUNK], scores)
    return best


def _first_level(state: _Rows, num_nodes: int) -> TokenTree:
    """A tree whose nodes from 1 on are all first tokens, with room for more."""
    tree = TokenTree.of_roots(state.roots, num_nodes)
    vocab = state.pair.vocab_size
    _add(tree, 1, 1, torch.arange(vocab).repeat(len(state.roots), 1), torch.zeros(1, dtype=torch.long))
    return tree


def _add(tree: TokenTree, first: int, depth: int, token_ids: Tensor, parents: Tensor) -> None:
    tree.add_level(
        first,
        depth,
        token_ids=token_ids,
        parents=parents.expand_as(token_ids),
        draft_log_probs=torch.zeros(token_ids.shape, dtype=torch.float64),
        ended=torch.zeros_like(token_ids, dtype=torch.bool),
    )


def _expand(state: _Rows, best: Tensor, found: Tensor, pairs: Tensor, scores: Tensor) -> None:
    """Look at all third tokens behind `pairs` `[rows, pairs]`, numbered first * vocab + second."""
    vocab = state.pair.vocab_size
    firsts, seconds = pairs // vocab, pairs % vocab
    tree = _first_level(state, 1 + vocab + pairs.shape[1])
    _add(tree, 1 + vocab, 2, seconds, firsts + 1)
    totals = scores[:, :, None] + state.laws(tree, 1 + vocab, pairs.shape[1])
    score, place = totals.flatten(1).max(1)
    row = torch.arange(len(place))
    chosen = place // vocab
    _keep(best, found, score, torch.stack([firsts[row, chosen], seconds[row, chosen], place % vocab], 1))


def _keep(best: Tensor, found: Tensor, score: Tensor, tokens: Tensor) -> None:
    """Put `tokens` `[rows, up to 3]` where they beat what was found."""
    better = score > found
    best[:, : tokens.shape[1]] = torch.where(better[:, None], tokens, best[:, : tokens.shape[1]])
    found.copy_(torch.where(better, score, found))


def _advance(state: _Rows, blocks: Tensor) -> None:
    """Commit the roots and all of `blocks` but their last tokens, which are the next roots."""
    tree = TokenTree.of_roots(state.roots, BLOCK)
    for depth in range(1, BLOCK):
        _add(tree, depth, depth, blocks[:, depth - 1 : depth], torch.tensor([[depth - 1]]))
    state.pair.target.forward(state.rows, state.lengths, tree)
    state.lengths = state.lengths + BLOCK
    state.roots = blocks[:, -1]
    # Rows that ended long ago run on to no purpose; they stay where they are.
    limit = state.pair.max_model_len - BLOCK
    state.lengths = state.lengths.clamp(max=limit)
    state.pair.target.cache.lengths[state.rows] = [int(length) for length in to_host(state.lengths)]
