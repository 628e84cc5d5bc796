"""References of the paper that are not served, to be compared with those that are.

The engine's reference of the draft is `best`: the joint log q of the best final beam's ancestor at a node's
depth. `max` is the highest joint log q of all nodes at that depth, `own` that of the node itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from torch import Tensor

from decoding.acceptance import best_reference, rule_depths
from decoding.methods import step
from decoding.token_tree import TokenTree

Reference = Callable[[TokenTree, Tensor, Tensor, int], Tensor]


def max_reference(tree: TokenTree, final_nodes: Tensor, limits: Tensor, depth: int) -> Tensor:
    """The maximum over all beams at the node's depth `[rows, nodes]`; an ended beam counts at later ones."""
    depths = rule_depths(tree, limits)
    at_depth = tree.depths[:, None, :] == depths[:, :, None]
    ended_before = tree.ended[:, None, :] & (tree.depths[:, None, :] <= depths[:, :, None])
    scores = tree.draft_log_probs[:, None, :].expand(-1, tree.num_nodes, -1)
    return torch.where(at_depth | ended_before, scores, -torch.inf).amax(-1)


def own_reference(tree: TokenTree, final_nodes: Tensor, limits: Tensor, depth: int) -> Tensor:
    """Every node's own joint log q `[rows, nodes]`."""
    return tree.draft_log_probs


DRAFT_REFERENCES: dict[str, Reference] = {
    "best": best_reference,
    "max": max_reference,
    "own": own_reference,
}


def draft_reference(name: str) -> AbstractContextManager[object]:
    """Within the context, `acceptance_reference: draft` means the draft reference `name`."""
    return patch.object(step, "best_reference", DRAFT_REFERENCES[name])
