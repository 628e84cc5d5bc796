"""The acceptance rules: pure functions from log-probabilities and uniforms to what is kept.

p is the target, q the draft, both after the request's transforms; x_1..x_d is the path of a node.
"""

import torch
from torch import Tensor

from decoding.sampler import sample
from decoding.token_tree import TokenTree, gather_at


def rejection_sample(
    token_ids: Tensor,
    draft_log_probs: Tensor,
    target_log_probs: Tensor,
    limits: Tensor,
    accept_uniforms: Tensor,
    next_uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept a chain token by token so that the output follows p exactly.

    Token i is accepted iff u_i < p(x_i) / q(x_i). At the first rejection the recovered token is drawn
    from norm(max(0, p - q)); when all are accepted, the bonus from p.
    (Leviathan et al. 2023; Chen et al. 2023.)

    Shapes: `token_ids` `[rows, depth]`, `draft_log_probs` `[rows, depth, vocab]`, `target_log_probs`
    `[rows, depth + 1, vocab]`, `limits` `[rows]` (tokens beyond were not proposed), `accept_uniforms`
    `[rows, depth]`, `next_uniforms` `[rows]`. Returns the number accepted and the next token, `[rows]`.
    """
    depth = token_ids.shape[1]
    index = token_ids.unsqueeze(-1)
    log_ratio = (target_log_probs[:, :depth].gather(2, index) - draft_log_probs.gather(2, index)).squeeze(-1)
    proposed = torch.arange(depth, device=token_ids.device) < limits[:, None]
    accepted = (accept_uniforms < log_ratio.double().exp()) & proposed
    num_accepted = accepted.long().cumprod(1).sum(1)
    rejected = num_accepted < limits
    at_end = gather_at(target_log_probs, num_accepted)
    q_at_end = gather_at(draft_log_probs, num_accepted.clamp(max=depth - 1))
    residual = (at_end.double().exp() - q_at_end.double().exp()).clamp(min=0)
    # p = q up to rounding can leave no residual; then a rejection has probability zero and p is right.
    recoverable = rejected & (residual.sum(-1) > 0)
    next_log_probs = torch.where(recoverable[:, None], residual.log(), at_end.double())
    return num_accepted, sample(next_log_probs, next_uniforms)


def best_reference(tree: TokenTree, final_nodes: Tensor, limits: Tensor, depth: int) -> Tensor:
    """log q_ref for every node: the joint log q of the best final beam's ancestor at the node's depth.

    `final_nodes` `[rows]` is the final beam of highest joint q. An ended beam keeps its score at every
    later depth. Returns `[rows, nodes]`.
    """
    path = tree.path(final_nodes, depth)
    scores = tree.draft_log_probs.gather(1, path)
    final_score = tree.draft_log_probs.gather(1, final_nodes[:, None])
    scores = torch.where(path > 0, scores, final_score)
    return scores.gather(1, (rule_depths(tree, limits) - 1).clamp(min=0))


def rule_depths(tree: TokenTree, limits: Tensor) -> Tensor:
    """Depth by which a node is judged `[rows, nodes]`: a node that ends counts as the step's full depth."""
    return torch.where(tree.ended, limits[:, None], tree.depths)


def longest_joint_prefix(
    tree: TokenTree, target_joint: Tensor, reference: Tensor, log_threshold: Tensor, limits: Tensor
) -> Tensor:
    """The deepest node v with log p(v) - log q_ref(v) > log tau; among equals the likeliest under p.

    An ancestor that fails does not matter; the root always passes. `target_joint` and `reference` are
    joint log-probabilities `[rows, nodes]`, `log_threshold` and `limits` (depth of the step) `[rows]`.
    Returns node numbers `[rows]`. (Qin et al. 2025, MTAD and MMTAD.)
    """
    real = tree.draft_log_probs > -torch.inf
    passes = (target_joint - reference > log_threshold[:, None]) & real
    depths = rule_depths(tree, limits).masked_fill(~passes, 0)
    passes[:, 0] = True
    deepest = depths.amax(1, keepdim=True)
    candidates = passes & (depths == deepest)
    return target_joint.masked_fill(~candidates, -torch.inf).argmax(1)
