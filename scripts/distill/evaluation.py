"""What a draft is worth on text it was not trained on, over the full vocabulary at temperature 1."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.distill.draft import Draft
from scripts.distill.text import Text

SEQUENCES = 8  # per pass
POSITIONS = 448  # per product with the head
TOP = 4


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over `positions`: `acceptance` is the sum of min(p, q) over the target's stored tokens.

    `ceiling` is the mass that these hold, `top_1` the share where both models' likeliest token is the
    same, `top_4` the share where the target's is among the draft's four likeliest.
    """

    acceptance: float
    ceiling: float
    top_1: float
    top_4: float
    positions: int

    def __str__(self) -> str:
        return (
            f"acceptance {self.acceptance:.4f} of at most {self.ceiling:.4f}, "
            f"same top token {self.top_1:.4f}, in the draft's top {TOP} {self.top_4:.4f} "
            f"({self.positions:,} positions)"
        )


@torch.no_grad()
def evaluate(draft: Draft, text: Text, output_ids: Tensor | None = None) -> Figures:
    """The figures on `text`; with a head cut to `output_ids` `[outputs]`, q is 0 outside."""
    head = draft.head if output_ids is None else draft.head[output_ids.to(draft.device)]
    places = _places(draft, output_ids)
    sums = torch.zeros(4, dtype=torch.float64, device=draft.device)
    for index in torch.split(torch.arange(len(text)), SEQUENCES):
        part = text.select(index).to(draft.device)
        columns = (draft.hidden(part.token_ids), part.top_ids, part.top_log_probs)
        for hidden, top_ids, log_p in zip(
            *(torch.split(each.flatten(0, 1), POSITIONS) for each in columns), strict=True
        ):
            sums += _sums(hidden @ head.T, places[top_ids], log_p)
    acceptance, ceiling, top_1, top_4 = (sums / text.num_tokens).tolist()
    return Figures(acceptance, ceiling, top_1, top_4, text.num_tokens)


def _places(draft: Draft, output_ids: Tensor | None) -> Tensor:
    """Row of the head for every token id `[vocab]`, -1 where there is none."""
    if output_ids is None:
        return torch.arange(draft.vocab_size, device=draft.device)
    places = torch.full((draft.vocab_size,), -1, device=draft.device)
    places[output_ids.to(draft.device)] = torch.arange(len(output_ids), device=draft.device)
    return places


def _sums(logits: Tensor, places: Tensor, log_p: Tensor) -> Tensor:
    """Sums `[4]` over positions; `places` `[positions, stored]` index `logits` `[positions, outputs]`."""
    stored = logits.gather(1, places.clamp(min=0)).masked_fill(places < 0, -math.inf)
    p = log_p.exp()
    q = (stored - logits.logsumexp(-1, keepdim=True)).exp()
    # Where the target's likeliest token has no row, every row of the head is ahead of it.
    rank = (logits > stored[:, :1]).sum(-1)
    parts = (torch.minimum(p, q).sum(-1), p.sum(-1), rank == 0, rank < TOP)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])
