"""Synthetic acceptance: how much of each proposal is kept is given, not decided by the models.

For pair S, whose weights are random: the speed of the system apart from how well two models agree. All
passes and rules run as they are served, for their cost; only their verdict is replaced. Every row of a
step keeps the same number of tokens, which differs by at most one from step to step, so that block
efficiency comes out as asked (less where `max_tokens` cuts a step).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from decoding.acceptance import longest_joint_prefix
from decoding.methods import multi_candidate, speculative, step
from decoding.methods.multi_candidate import MultiCandidate, level_sizes
from decoding.token_tree import TokenTree


class Acceptance:
    """Depths to keep, step after step, whose mean is `block_efficiency` - 1."""

    def __init__(self, block_efficiency: float) -> None:
        self._mean = block_efficiency - 1
        self._steps = 0

    def depth(self) -> int:
        """Tokens that the next step keeps of its proposal."""
        self._steps += 1
        return int(self._steps * self._mean) - int((self._steps - 1) * self._mean)

    def joint_prefix(
        self, tree: TokenTree, target_joint: Tensor, reference: Tensor, log_threshold: Tensor, limits: Tensor
    ) -> Tensor:
        """`longest_joint_prefix` that ends at the first node of the given depth."""
        longest_joint_prefix(tree, target_joint, reference, log_threshold, limits)
        wanted = limits.clamp(max=self.depth())
        candidates = (tree.depths == wanted[:, None]) & (tree.draft_log_probs > -torch.inf)
        return candidates.int().argmax(1)

    def chain(self, verifier: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """A verifier of chains that keeps the given depth; the next token is the rule's own."""

        def verify(
            token_ids: Tensor,
            draft_log_probs: Tensor,
            target_log_probs: Tensor,
            limits: Tensor,
            *rest: Tensor,
        ) -> tuple[Tensor, Tensor]:
            _, next_ids = verifier(token_ids, draft_log_probs, target_log_probs, limits, *rest)
            return limits.clamp(max=self.depth()), next_ids

        return verify

    def descend(self, descend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """A way down a sampled tree that takes first children, as deep as given."""

        def first_children(
            method: MultiCandidate, tree: TokenTree, batch: Any, *rest: Tensor
        ) -> tuple[Tensor, Tensor]:
            _, law = descend(method, tree, batch, *rest)
            sizes = level_sizes(batch.preset.candidates)
            starts = torch.tensor([sum(sizes[:level]) for level in range(len(sizes))], device=law.device)
            return starts[batch.limits.clamp(max=min(self.depth(), batch.depth))], law

        return first_children


@contextmanager
def synthetic_acceptance(block_efficiency: float) -> Iterator[None]:
    """Within the context every step keeps `block_efficiency` - 1 drafted tokens on average.

    Raises:
        ValueError: it is below 1.
    """
    if block_efficiency < 1:
        raise ValueError(f"block efficiency is at least 1, not {block_efficiency}")
    acceptance = Acceptance(block_efficiency)
    verifiers = {name: acceptance.chain(rule) for name, rule in speculative.VERIFIERS.items()}
    with ExitStack() as stack:
        stack.enter_context(patch.object(step, "longest_joint_prefix", acceptance.joint_prefix))
        stack.enter_context(patch.dict(speculative.VERIFIERS, verifiers))
        descend = acceptance.descend(MultiCandidate._descend)
        stack.enter_context(patch.object(multi_candidate.MultiCandidate, "_descend", descend))
        yield
