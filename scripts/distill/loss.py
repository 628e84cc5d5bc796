"""What is minimised: cross-entropy to the stored tokens, later mixed with the acceptance itself.

The softmax runs over a candidate set per batch: all stored tokens of the batch, the most frequent
ones, and a uniform sample of the rest. The sample's logits are raised by log(rest / sampled), so that
the normaliser is an unbiased estimate of the one over the whole vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FREQUENT_TOKENS = 2500
SAMPLED_TOKENS = 1500
ACCEPTANCE_SCALE = 2.0  # brings the gradient of the acceptance to the size of the cross-entropy's
LEAST_TAIL = 1e-5


@dataclass(frozen=True, slots=True)
class Candidates:
    """`token_ids` `[candidates]`, their `shift` in nats, and the `places` `[vocab]` of tokens among them."""

    token_ids: Tensor
    shift: Tensor
    places: Tensor


def draw_candidates(
    top_ids: Tensor, frequent: Tensor, vocab_size: int, generator: torch.Generator
) -> Candidates:
    """The candidate set of a batch with the stored tokens `top_ids`."""
    used = torch.zeros(vocab_size, dtype=torch.bool, device=top_ids.device)
    used[top_ids.reshape(-1)] = True
    used[frequent] = True
    inside, rest = used.nonzero()[:, 0], (~used).nonzero()[:, 0]
    order = torch.randperm(len(rest), generator=generator)[:SAMPLED_TOKENS]
    extra = rest[order.to(rest.device)]
    shift = torch.zeros(len(inside) + len(extra), device=top_ids.device)
    if len(extra):
        shift[len(inside) :] = math.log(len(rest) / len(extra))
    places = torch.zeros(vocab_size, dtype=torch.long, device=top_ids.device)
    places[inside] = torch.arange(len(inside), device=top_ids.device)
    return Candidates(torch.cat([inside, extra]), shift, places)


def draft_log_probs(hidden: Tensor, head: Tensor, top_ids: Tensor, candidates: Candidates) -> Tensor:
    """log q `[positions, stored]` of `top_ids` from states `[positions, width]` and head `[vocab, width]`."""
    logits = torch.addmm(candidates.shift, hidden, head[candidates.token_ids].T)
    return logits.gather(1, candidates.places[top_ids]) - logits.logsumexp(-1, keepdim=True)


def distillation_loss(log_q: Tensor, log_p: Tensor, acceptance_weight: float) -> tuple[Tensor, Tensor]:
    """The loss of a batch and its mean acceptance, from log-probabilities `[positions, stored]` in nats.

    Cross-entropy has one more bucket for the mass outside the stored tokens; the acceptance is the sum
    of min(p, q) over them.
    """
    p = log_p.exp()
    # A place that only fills up has p = 0 and belongs to no token of its own.
    q = log_q.exp() * (log_p > -math.inf)
    tail_p = (1 - p.sum(-1)).clamp(min=0)
    tail_q = (1 - q.sum(-1)).clamp(min=LEAST_TAIL)
    cross_entropy = -(p * log_q).sum(-1) - tail_p * tail_q.log()
    acceptance = torch.minimum(p, q).sum(-1)
    mixed = (1 - acceptance_weight) * cross_entropy - acceptance_weight * ACCEPTANCE_SCALE * acceptance
    return mixed.mean(), acceptance.mean().detach()
