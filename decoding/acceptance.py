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


def block_verify(
    token_ids: Tensor,
    draft_log_probs: Tensor,
    target_log_probs: Tensor,
    limits: Tensor,
    accept_uniforms: Tensor,
    next_uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept a chain as a block: exactly p, and never shorter in expectation than token by token.

    With P_0 = 1 and P_i = min(1, P_{i-1} p(x_i) / q(x_i)), the prefix of length i is accepted iff
    u_i < h_i, where h_i = R_i / (R_i + 1 - P_i), R_i = sum_x max(0, P_i p(x) - q(x)) after the prefix,
    and h_depth = P_depth. The longest accepted prefix counts. After it the recovered token is drawn from
    norm(max(0, P_i p - q)), or the bonus from p behind a whole chain. (Sun et al. 2024.)

    Shapes as in `rejection_sample`.
    """
    depth = token_ids.shape[1]
    p, q = target_log_probs.double().exp(), draft_log_probs.double().exp()
    kept_mass = _block_mass(token_ids, p, q)
    residual = (kept_mass[:, :depth, None] * p[:, :depth] - q).clamp(min=0)
    residual_mass = residual.sum(-1)
    lengths = torch.arange(depth + 1, device=token_ids.device)
    whole = lengths == limits[:, None]
    refused = residual_mass + 1 - kept_mass[:, :depth]
    partial = torch.where(refused > 0, residual_mass / refused, 0.0)
    accept = torch.where(whole, kept_mass, torch.nn.functional.pad(partial, (0, 1)))
    passes = (accept_uniforms < accept[:, 1:]) & (lengths[1:] <= limits[:, None])
    num_accepted = (passes * lengths[1:]).amax(1)
    after = gather_at(residual, num_accepted.clamp(max=depth - 1))
    recoverable = (num_accepted < limits) & (after.sum(-1) > 0)
    at_end = gather_at(target_log_probs, num_accepted).double()
    return num_accepted, sample(torch.where(recoverable[:, None], after.log(), at_end), next_uniforms)


def _block_mass(token_ids: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """P_0 .. P_depth of `block_verify`, `[rows, depth + 1]`."""
    depth = token_ids.shape[1]
    index = token_ids.unsqueeze(-1)
    ratios = (p[:, :depth].gather(2, index) / q.gather(2, index)).squeeze(-1)
    masses = [torch.ones_like(ratios[:, 0])]
    for level in range(depth):
        masses.append((masses[-1] * ratios[:, level]).clamp(max=1))
    return torch.stack(masses, dim=1)


def recursive_rejection_sample(
    child_ids: Tensor,
    target_log_probs: Tensor,
    draft_log_probs: Tensor,
    accept_uniforms: Tensor,
    *,
    replacement: bool,
) -> tuple[Tensor, Tensor]:
    """Try the children of one node in the order they were drawn; what is emitted follows p exactly.

    Child x is accepted iff u < r(x) / q(x), with r = p at first. After a rejection r becomes
    norm(max(0, r - q)), and where children were drawn without replacement x leaves q, which is
    renormalised. (SpecInfer, Miao et al. 2024; MCSD, Yang et al. 2024.)

    Shapes: `child_ids` and `accept_uniforms` `[rows, children]`, log-probabilities `[rows, vocab]`.
    Returns the index of the accepted child, or -1, `[rows]`, and the law `[rows, vocab]` in logs that
    the recovered token of a row without one is drawn from.
    """
    residual, q = target_log_probs.double().exp(), draft_log_probs.double().exp()
    accepted = torch.full_like(child_ids[:, 0], -1)
    for child in range(child_ids.shape[1]):
        token = child_ids[:, child : child + 1]
        share = q.gather(1, token).squeeze(1)
        # A child of probability zero only pads a node whose draft offers fewer tokens.
        ratio = torch.where(share > 0, residual.gather(1, token).squeeze(1) / share, 0.0)
        open_rows = accepted < 0
        accepted = torch.where(open_rows & (accept_uniforms[:, child] < ratio), child, accepted)
        left = (residual - q).clamp(min=0)
        # Rounding can leave nothing where p = q; then the child was accepted with probability one.
        mass = left.sum(1, keepdim=True)
        rejected = (accepted < 0)[:, None] & (mass > 0)
        residual = torch.where(rejected, left / mass, residual)
        if not replacement:
            q = q.scatter(1, token, 0.0)
            q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return accepted, residual.log()
