"""What a request changes in both models' logits before temperature: bias, penalties, a minimum length.

Each applies at every node of a token tree, from the node's own path.
"""

import math
from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.sequence import Sequence
from decoding.token_tree import TokenTree


@dataclass(slots=True)
class Adjustments:
    """State of the rows of one batch; kept only where some row asks for any of it.

    `bias` and `output_counts` are `[rows, vocab]`, `prompt_seen` too; penalties, `min_tokens` and
    `num_outputs` (tokens delivered so far) are `[rows]`, `end_ids` `[rows, ends]`, -1 for padding.
    """

    bias: Tensor
    prompt_seen: Tensor
    output_counts: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    min_tokens: Tensor
    num_outputs: Tensor
    end_ids: Tensor

    @classmethod
    def of(
        cls, sequences: Series[Sequence], end_ids: Tensor, vocab_size: int, device: torch.device
    ) -> "Adjustments | None":
        """None when every row leaves the logits as they are."""
        params = [sequence.params for sequence in sequences]
        if not any(row.adjusts_logits for row in params):
            return None
        bias = torch.zeros(len(params), vocab_size, device=device)
        seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
        counts = torch.zeros(len(params), vocab_size, device=device)
        for row, sequence in enumerate(sequences):
            for token_id, value in sequence.params.logit_bias:
                bias[row, token_id] = value
            seen[row, sequence.prompt_ids] = True
            outputs = torch.tensor(sequence.output_ids, dtype=torch.long, device=device)
            counts[row].scatter_add_(0, outputs, torch.ones_like(outputs, dtype=counts.dtype))

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None, None]

        return cls(
            bias=bias,
            prompt_seen=seen,
            output_counts=counts,
            presence=numbers([row.presence_penalty for row in params]),
            frequency=numbers([row.frequency_penalty for row in params]),
            repetition=numbers([row.repetition_penalty for row in params]),
            min_tokens=torch.tensor([row.min_tokens for row in params], device=device),
            num_outputs=torch.tensor([len(each.output_ids) for each in sequences], device=device),
            end_ids=end_ids,
        )

    def apply(self, logits: Tensor, tree: TokenTree, first: int = 0) -> Tensor:
        """Adjusted copies of `logits` `[rows, nodes, vocab]`, which belong to nodes `first` onwards.

        Bias, then repetition (prompt, output and path), then presence and frequency (output and path),
        then the ends are excluded up to `min_tokens`.
        """
        nodes = slice(first, first + logits.shape[1])
        counts = self.output_counts[:, None].repeat(1, logits.shape[1], 1)
        on_path = tree.ancestors[:, nodes, 1:]
        path_ids = tree.token_ids[:, None, 1:].expand(-1, logits.shape[1], -1)
        counts.scatter_add_(2, path_ids, on_path.to(counts.dtype))
        adjusted = logits + self.bias[:, None]
        seen = (counts > 0) | self.prompt_seen[:, None]
        repeated = torch.where(adjusted > 0, adjusted / self.repetition, adjusted * self.repetition)
        adjusted = torch.where(seen, repeated, adjusted)
        adjusted = adjusted - self.frequency * counts - self.presence * (counts > 0)
        return self._without_early_ends(adjusted, tree.depths[:, nodes])

    def advance(self, delivered: Tensor, num_tokens: Tensor) -> None:
        """Count the first `num_tokens` `[rows]` of `delivered` `[rows, most]` as output."""
        counted = torch.arange(delivered.shape[1], device=delivered.device) < num_tokens[:, None]
        self.output_counts = self.output_counts.scatter_add(
            1, delivered, counted.to(self.output_counts.dtype)
        )
        self.num_outputs = self.num_outputs + num_tokens

    def check_integrity(self, sequences: Series[Sequence]) -> None:
        """Assert that what was counted step by step is what `sequences` hold."""
        fresh = Adjustments.of(sequences, self.end_ids, self.bias.shape[1], self.bias.device)
        assert fresh is not None
        assert torch.equal(self.output_counts, fresh.output_counts)
        assert torch.equal(self.num_outputs, fresh.num_outputs)

    def _without_early_ends(self, logits: Tensor, depths: Tensor) -> Tensor:
        too_early = self.num_outputs[:, None] + depths + 1 <= self.min_tokens[:, None]
        # A stop id may lie outside the vocabulary, where it never comes up.
        known = (self.end_ids >= 0) & (self.end_ids < logits.shape[-1])
        banned = too_early[:, :, None] & known[:, None, :]
        index = self.end_ids.where(known, 0)[:, None, :].expand_as(banned)
        kept = logits.gather(2, index)
        return logits.scatter_reduce(2, index, kept.masked_fill(banned, -math.inf), "amin")
