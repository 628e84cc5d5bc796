"""What every method returns, and the shared end of a step that verified a tree."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decoding.acceptance import longest_joint_prefix
from decoding.batch import Batch
from decoding.model import CausalModel
from decoding.model_pair import ModelPair
from decoding.sampler import Draw, sample, to_log_probs, uniforms
from decoding.sequence import TopLogProbs, top_log_probs
from decoding.token_tree import TokenTree, gather_at


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Tokens of one step, still on the device, before truncation at ends.

    `token_ids` and `log_probs` (nats, untransformed) are `[rows, depth + 1]`, of which the first
    `num_tokens` `[rows]` count: `num_accepted` `[rows]` from the draft, the rest the model's own.
    `num_drafted` `[rows]` is the depth proposed, `num_nodes` the nodes verified per row, root apart;
    `finite` `[rows]` is false where a model gave values that are not numbers. `top_ids` and
    `top_log_probs` `[rows, depth + 1, top]` are the likeliest tokens, where some row asks for them.
    """

    token_ids: Tensor
    log_probs: Tensor
    num_tokens: Tensor
    num_accepted: Tensor
    num_drafted: Tensor
    finite: Tensor
    num_nodes: int
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None

    def packed(self) -> Tensor:
        """Everything in one float64 tensor `[rows, numbers]`: one copy to the host, read by `unpack`."""
        counts = (self.num_tokens, self.num_accepted, self.num_drafted, self.finite)
        parts = [*(part[:, None] for part in counts), self.token_ids, self.log_probs]
        if self.top_ids is not None and self.top_log_probs is not None:
            parts += [self.top_ids.flatten(1), self.top_log_probs.flatten(1)]
        return torch.cat([part.double() for part in parts], dim=1)

    def unpack(self, values: list[float]) -> "RowStep":
        """One row of `packed` after its copy to the host."""
        num_tokens, num_accepted, num_drafted, finite = (int(value) for value in values[:4])
        width = self.token_ids.shape[1]
        num_top = 0 if self.top_ids is None else self.top_ids.shape[2]
        ids, log_probs, rest = (
            values[4 : 4 + width],
            values[4 + width : 4 + 2 * width],
            values[4 + 2 * width :],
        )
        top_ids, tops = rest[: width * num_top], rest[width * num_top :]
        return RowStep(
            token_ids=[int(value) for value in ids[:num_tokens]],
            log_probs=log_probs[:num_tokens],
            top_log_probs=[
                top_log_probs(top_ids[start : start + num_top], tops[start : start + num_top])
                for start in range(0, num_tokens * num_top, num_top or 1)
            ],
            num_accepted=num_accepted,
            num_drafted=num_drafted,
            finite=bool(finite),
        )


@dataclass(frozen=True, slots=True)
class RowStep:
    """One row of a `DecodeStep` on the host: the tokens that count, and what was counted."""

    token_ids: list[int]
    log_probs: list[float]
    top_log_probs: list[TopLogProbs]
    num_accepted: int
    num_drafted: int
    finite: bool


class Method(Protocol):
    """Proposes, verifies, accepts and commits one step for all rows of a batch, and advances it."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep: ...


def joint_step(
    pair: ModelPair, batch: Batch, tree: TokenTree, draft_reference: Tensor
) -> tuple[DecodeStep, Tensor]:
    """Verify `tree` in one target pass and keep its longest joint prefix, then one token of the target's.

    `draft_reference` `[rows, nodes]` is `best_reference` of the tree that was proposed. The target's
    cache is left to the caller to commit. Returns the step and the accepted path `[rows, depth]` of nodes.
    """
    logits = pair.target.forward(batch.rows, batch.lengths, tree)
    adjusted = batch.adjusted(logits, tree)
    log_probs = to_log_probs(adjusted, batch.sampling, point_mass=False)
    joint = tree.joint(_conditional(tree, log_probs))
    reference = _reference(tree, batch, log_probs, draft_reference)
    node = longest_joint_prefix(tree, joint, reference, batch.log_thresholds, batch.limits)
    path = tree.path(node, batch.depth)
    next_log_probs = to_log_probs(gather_at(adjusted, node)[:, None], batch.sampling, point_mass=True)[:, 0]
    next_ids = sample(next_log_probs, uniforms(batch.streams, Draw.NEXT))
    num_accepted = gather_at(tree.depths, node)
    step = collect(batch, tree, path, logits, num_accepted, next_ids, ended=gather_at(tree.ended, node))
    return step, path


def collect(
    batch: Batch,
    tree: TokenTree,
    path: Tensor,
    logits: Tensor,
    num_accepted: Tensor,
    next_ids: Tensor,
    ended: Tensor | None = None,
) -> DecodeStep:
    """The accepted `path` `[rows, depth]` and `next_ids` `[rows]` as a step; advances the batch.

    `logits` `[rows, nodes, vocab]` are the target's. No token follows a block that `ended`.
    """
    depth = path.shape[1]
    token_ids = tree.token_ids.gather(1, path)
    token_ids = torch.cat([token_ids, torch.zeros_like(next_ids)[:, None]], dim=1)
    token_ids.scatter_(1, num_accepted[:, None], next_ids[:, None])
    sources = torch.cat([torch.zeros_like(next_ids)[:, None], path], dim=1)
    num_tokens = num_accepted + 1 if ended is None else num_accepted + (~ended)
    # Only what is delivered is normalised: at up to depth + 1 of the nodes.
    delivered = logits.gather(1, sources[:, :, None].expand(-1, -1, logits.shape[-1])).log_softmax(-1)
    top_ids, top_values = top_tokens(batch, delivered)
    step = DecodeStep(
        token_ids=token_ids,
        log_probs=delivered.gather(2, token_ids[:, :, None])[:, :, 0],
        num_tokens=num_tokens,
        num_accepted=num_accepted,
        num_drafted=batch.limits.clamp(max=depth),
        finite=logits.amax(-1).isfinite().all(1) & tree.finite,
        num_nodes=tree.num_nodes - 1,
        top_ids=top_ids,
        top_log_probs=top_values,
    )
    batch.advance(token_ids, num_tokens)
    return step


def single_step(model: CausalModel, batch: Batch) -> DecodeStep:
    """One token for every row from one model's pass over its roots."""
    tree = TokenTree.of_roots(batch.roots, 1)
    logits = model.forward(batch.rows, batch.lengths, tree)
    log_probs = batch.log_probs(logits, tree, point_mass=True)[:, 0]
    next_ids = sample(log_probs, uniforms(batch.streams, Draw.NEXT))
    nothing = torch.zeros_like(next_ids)
    return collect(batch, tree, tree.parents[:, :0], logits, nothing, next_ids)


def _conditional(tree: TokenTree, log_probs: Tensor) -> Tensor:
    """log p of each node's token at its parent, `[rows, nodes]`."""
    flat = tree.parents * log_probs.shape[-1] + tree.token_ids
    return log_probs.flatten(1).gather(1, flat).double()


def _reference(tree: TokenTree, batch: Batch, log_probs: Tensor, draft_reference: Tensor) -> Tensor:
    """Each row's own reference `[rows, nodes]`: the best final beam's q, or the target's best choices."""
    target = tree.joint(log_probs.amax(-1).double().gather(1, tree.parents))
    return torch.where(batch.target_reference[:, None], target, draft_reference)


def top_tokens(batch: Batch, log_probs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The likeliest tokens at each of `[rows, tokens, vocab]`, where some row asks for them."""
    if batch.num_top_log_probs == 0:
        return None, None
    best = log_probs.topk(batch.num_top_log_probs, dim=-1)
    return best.indices, best.values
